"""Speed and coverage of the analysis, each peer timed in the same run.

Without arguments: timings. With ``--coverage``: 1000 synthetic studies too (minutes).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from synthetic import ladder

from analysis.data.cells import Array, Rows, select
from analysis.data.table import check_table, read_table
from analysis.fitting.families import LAW_FAMILIES, fit_family, ratio_of
from analysis.fitting.fit import solve
from analysis.fitting.laws import LAWS
from analysis.fitting.objective import HUBER
from analysis.ratio.moonlight import MOONLIGHT_LINES
from analysis.ratio.study import fit_table
from analysis.uncertainty.intervals import bootstrap, percentile, t_interval

POINTS = ROOT.parent / "shared" / "reference" / "chinchilla" / "points.csv"
DELTA = 1e-3


def best_of(call: Callable[[], object], times: int) -> float:
    """The least of several wall times, in seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def points() -> tuple[Array, Array, Array, str]:
    """Params, tokens, loss of 240 points, and where they are from."""
    if POINTS.exists():
        raw = pd.read_csv(POINTS).sort_values("loss", kind="stable").head(240)
        params, flops = raw["Model Size"].to_numpy(), raw["Training FLOP"].to_numpy()
        return params, flops / 6 / params, raw["loss"].to_numpy(), "Hoffmann's runs as extracted by Besiroglu et al."
    generator = np.random.default_rng(0)
    params = np.exp(generator.uniform(np.log(4e7), np.log(1.5e10), 240))
    tokens = np.exp(generator.uniform(np.log(1e9), np.log(3e11), 240))
    columns = {"params": params, "tokens": tokens, "flops": 6 * params * tokens}
    noise = 0.005 * generator.standard_t(3, 240)
    return params, tokens, LAWS["surface"].example.evaluate(columns) * np.exp(noise), "synthetic"


def reference_objective(theta: Array, x: Array, y: Array, target: Array, weights: Array) -> float:
    """Huber on log loss of ``log(e^E + e^(a - alpha x) + e^(b - beta y))``, summed: the field's own form."""
    e, a, b, alpha, beta = theta
    r = np.logaddexp(np.logaddexp(np.full_like(x, e), a - alpha * x), b - beta * y) - target
    size = np.abs(r)
    return float(np.sum(weights * np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))))


def time_fits() -> None:
    """One fit, and the bootstrap."""
    from scipy.optimize import least_squares, minimize

    params, tokens, loss, source = points()
    rows = Rows(np.zeros(240, dtype=np.intp), loss, {"params": params, "tokens": tokens, "flops": 6 * params * tokens})
    form = LAWS["surface"]
    ours = solve(form, rows, HUBER)
    lowest = ours.certificate.objective
    print(f"240 points ({source}); surface, Huber {DELTA:g} on log loss, minimum {lowest:.9g}")
    print(f"{'point fit':<58}{'ms':>9}   objective above the minimum")

    def report(label: str, seconds: float, value: float) -> None:
        print(f"  {label:<56}{1e3 * seconds:9.2f}   {value / lowest - 1:.1e}")

    one = solve(form, rows, HUBER, best_of=1)
    report(
        "ours, best of 16 screened starts followed",
        best_of(lambda: solve(form, rows, HUBER, best_of=1), 9),
        one.certificate.objective,
    )
    report(
        f"ours, all 16 starts, {ours.certificate.agreeing:.0%} agree",
        best_of(lambda: solve(form, rows, HUBER), 5),
        lowest,
    )

    x, y, target = np.log(params), np.log(tokens), np.log(loss)
    mx, my = x.mean(), y.mean()
    start = np.array([np.log(1.69), np.log(406.4) - 0.34 * mx, np.log(410.7) - 0.28 * my, 0.34, 0.28])

    def parts(theta: Array) -> Array:
        e, a, b, alpha, beta = theta
        return np.stack([np.full_like(x, e), a - alpha * (x - mx), b - beta * (y - my)])

    def residual(theta: Array) -> Array:
        terms = parts(theta)
        return np.asarray(np.log(np.exp(terms).sum(axis=0)) - target)

    def jacobian(theta: Array) -> Array:
        shares = np.exp(parts(theta))
        shares /= shares.sum(axis=0)
        return np.stack([shares[0], shares[1], shares[2], -shares[1] * (x - mx), -shares[2] * (y - my)], axis=1)

    def scipy_fit() -> Array:
        found = least_squares(
            residual,
            start,
            jac=jacobian,
            loss="huber",
            f_scale=DELTA,
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        return np.asarray(found.x)

    def value(theta: Array) -> float:
        e, a, b, alpha, beta = theta
        raw = np.array([e, a + alpha * mx, b + beta * my, alpha, beta])
        return reference_objective(raw, x, y, target, np.ones(240))

    report("scipy least_squares, analytic Jacobian, Hoffmann's start", best_of(scipy_fit, 9), value(scipy_fit()))
    time_chinchilla(params, tokens, loss, report, x, y, target)

    print("bootstrap, 4000 resamples")
    groups = np.arange(240)
    seconds = best_of(lambda: bootstrap(ours, groups, resamples=4000), 3)
    spread = np.std(bootstrap(ours, groups, resamples=4000), axis=0)
    print(f"  {'ours, every resample to its minimum':<56}{seconds:9.2f} s")
    raw = np.array([ours.law().E, ours.law().A, ours.law().B, ours.law().alpha, ours.law().beta])  # type: ignore[union-attr]
    at = np.array([np.log(raw[0]), np.log(raw[1]), np.log(raw[2]), raw[3], raw[4]])
    generator = np.random.default_rng(0)
    began = time.perf_counter()
    draws = []
    for _ in range(100):
        weights = generator.multinomial(240, np.full(240, 1 / 240)).astype(np.float64)
        draws.append(minimize(reference_objective, at, (x, y, target, weights), method="L-BFGS-B").x)
    taken = time.perf_counter() - began
    print(f"  {'L-BFGS-B with finite differences a resample':<56}{40 * taken:9.2f} s   timed on 100, times 40")
    print(f"  one thread each; ours is {40 * taken / seconds:.0f} times as fast")
    exponents = [j for j, slot in enumerate(ours.design.slots) if slot.column]
    told = ", ".join(f"{spread[j]:.4f}" for j in exponents)
    print(
        f"  standard errors of alpha, beta: ours {told}; L-BFGS-B {np.std(draws, axis=0)[3]:.4f}, {np.std(draws, axis=0)[4]:.4f}"
    )


def time_chinchilla(
    params: Array,
    tokens: Array,
    loss: Array,
    report: Callable[[str, float, float], None],
    x: Array,
    y: Array,
    target: Array,
) -> None:
    """The package of that name with its default grid, where it can be imported."""
    try:
        from chinchilla import Chinchilla
        from chinchilla._metrics import log_huber
    except ImportError as error:
        print(f"  the package chinchilla cannot be imported here ({error}), so its fit is not timed")
        return
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame({"C": 6 * params * tokens, "N": params, "D": tokens, "loss": loss}).to_csv(
            f"{folder}/df.csv", index=False
        )
        grid = {"E": np.linspace(1, 2, 5), "A": np.geomspace(1, 1000, 5), "B": np.geomspace(1, 1000, 5),
                "alpha": np.linspace(0.1, 0.7, 5), "beta": np.linspace(0.1, 0.7, 5)}  # fmt: skip
        peer = Chinchilla(
            folder,
            param_grid=grid,
            seed_ranges={"C": (1e18, 1e22), "N_to_D": (1, 100)},
            loss_fn=partial(log_huber, delta=DELTA),
            log_level=50,
        )
        start = time.perf_counter()
        peer.fit(parallel=False)
        seconds = time.perf_counter() - start
        theta = np.array([np.log(peer.E), np.log(peer.A), np.log(peer.B), peer.alpha, peer.beta])
        report(
            "chinchilla, 3125 starts of its documented grid",
            seconds,
            reference_objective(theta, x, y, target, np.ones(240)),
        )


def time_table() -> None:
    """A table of 100,000 checkpoints of 500 runs, from the file to the ratio and the clustered errors."""
    from analysis.single_arm.fit_arm import fit_arm

    surface = LAWS["surface"].example
    generator = np.random.default_rng(0)
    parts = []
    for run in range(250):
        params = float(np.exp(generator.uniform(np.log(3e7), np.log(3e9))))
        budget = params * float(np.exp(generator.uniform(np.log(5), np.log(60))))
        tokens = budget * np.linspace(0.05, 1, 200)
        for arm, worth in (("adamw", 1.0), ("muon", 1.8)):
            law = surface.loss(np.full(200, params), worth * tokens)  # type: ignore[union-attr,arg-type]
            noise = 0.004 * generator.standard_normal() + 0.001 * generator.standard_normal(200)
            parts.append(pd.DataFrame({"arm": arm, "params": params, "tokens": tokens, "flops": 6 * params * tokens,
                                       "loss": law * np.exp(noise), "run": f"{arm}{run}", "cell": run}))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        pd.concat(parts).to_csv(path, index=False)
        start = time.perf_counter()
        frame = read_table(path)
        read = time.perf_counter() - start
        head = fit_table(frame).comparisons[0].headline
        ratio = time.perf_counter() - start
        found = fit_arm(frame, "surface", "muon")
        whole = time.perf_counter() - start
    print("table of 100,000 checkpoints of 500 runs")
    print(f"  read {read:.2f} s; ratio {head.ratio:.4f} (planted {1 / 1.8:.4f}) after {ratio:.2f} s")
    print(f"  one arm's surface from 50,000 rows with errors clustered over {found.units} runs after {whole:.2f} s")


def time_import() -> None:
    """The first import in a fresh interpreter."""
    seconds = best_of(
        lambda: subprocess.run([sys.executable, "-c", "import analysis.ratio.study"], check=True, cwd=ROOT), 3
    )
    bare = best_of(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True, cwd=ROOT), 3)
    print(f"import analysis.ratio.study: {seconds:.2f} s, of which the interpreter {bare:.2f} s")


def coverage(studies: int = 1000) -> None:
    """How often 95 % intervals hold the truth, with cell noise of 0.45 % shared and 0.08 % of difference."""
    for rungs, seeds, loss in ((5, 1, 2.418), (5, 1, 2.6), (6, 3, 2.418), (12, 3, 2.418), (11, 6, 2.418)):
        truth = np.log(MOONLIGHT_LINES["muon"].compute(loss) / MOONLIGHT_LINES["adamw"].compute(loss))
        hits = np.zeros(3)
        widths = np.zeros(3)
        for seed in range(studies):
            frame = ladder(MOONLIGHT_LINES, rungs=rungs, seeds=seeds, shared=0.0045, own=0.0008 / np.sqrt(2), seed=seed,
                           smallest=0.209 * 8.64e19, largest=4.04 * 8.64e19)  # fmt: skip
            cells = select(check_table(frame), ("adamw", "muon"))
            fitted = fit_family(LAW_FAMILIES["lines"], cells.rows, 2, best_of=1)

            def quantity(theta: Array, fitted=fitted) -> Array:  # type: ignore[no-untyped-def]
                return ratio_of(fitted, theta, np.array([loss]))  # noqa: B023

            ends = [
                t_interval(fitted, cells, quantity),
                t_interval(fitted, cells._replace(cell=np.arange(len(cells.cell))), quantity),
            ]
            if rungs * seeds > 10:
                draws = quantity(bootstrap(fitted, cells.cell, resamples=400, seed=seed))
                ends.append(percentile(draws, quantity(fitted.theta)))
            for at, (low, high) in enumerate(ends):
                hits[at] += low[0] <= truth <= high[0]
                widths[at] += high[0] - low[0]
        found = zip(("paired t", "arms independent", "paired bootstrap"), hits / studies, widths / studies, strict=True)
        print(f"coverage over {studies} studies of {rungs} rungs x {seeds} seeds, at loss {loss}")
        for label, share, width in found:
            if width:
                print(f"  {label:<20} {share:.3f}   mean width {width:.3f} in ln ratio")


if __name__ == "__main__":
    time_import()
    time_fits()
    time_table()
    if "--coverage" in sys.argv:
        coverage()
