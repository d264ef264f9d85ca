"""Intervals cover as often as they say, and pairing is what makes them narrow.

The full study (1000 draws) is tests/bench/bench_analysis.py; here are as many as a test can afford.
"""

import numpy as np
import pandas as pd
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.data.cells import Array, Cells, select
from analysis.data.table import check_table
from analysis.fitting.families import LAW_FAMILIES, fit_family, ratio_of
from analysis.fitting.fit import Minimum
from analysis.ratio.moonlight import MOONLIGHT_LINES
from analysis.ratio.study import fit_table
from analysis.uncertainty.intervals import bootstrap, percentile, t_interval
from analysis.uncertainty.paired import difference
from analysis.uncertainty.robustness import wild

LOSS = 2.418
TRUTH = float(np.log(MOONLIGHT_LINES["muon"].compute(LOSS) / MOONLIGHT_LINES["adamw"].compute(LOSS)))
DRAWS = 150


def draw(seed: int, rungs: int = 5, seeds: int = 1) -> tuple[Cells, Minimum]:
    """A study like Moonlight's: the arms of a cell share 0.45 % of noise and differ by 0.08 %."""
    frame = ladder(
        MOONLIGHT_LINES,
        rungs=rungs,
        seeds=seeds,
        shared=0.0045,
        own=0.0008 / np.sqrt(2),
        seed=seed,
        smallest=0.209 * 8.64e19,
        largest=4.04 * 8.64e19,
    )
    cells = select(check_table(frame), ("adamw", "muon"))
    return cells, fit_family(LAW_FAMILIES["lines"], cells.rows, 2, best_of=1)


def log_ratio(fitted: Minimum, theta: Array) -> Array:
    return ratio_of(fitted, theta, np.array([LOSS]))


def alone(cells: Cells) -> Cells:
    """The same rows with their pairing forgotten."""
    return cells._replace(cell=np.arange(len(cells.cell)))


@pytest.fixture(scope="module")
def studies() -> list[tuple[float, float, float, float]]:
    ends = []
    for seed in range(DRAWS):
        cells, fitted = draw(seed)
        paired = t_interval(fitted, cells, lambda theta, fitted=fitted: log_ratio(fitted, theta))
        free = t_interval(fitted, alone(cells), lambda theta, fitted=fitted: log_ratio(fitted, theta))
        ends.append((paired[0][0], paired[1][0], free[0][0], free[1][0]))
    return ends


def test_paired_interval_covers(studies: list[tuple[float, ...]]) -> None:
    covered = np.mean([low <= TRUTH <= high for low, high, _, _ in studies])
    # 95 % of 150 draws: three standard errors are 0.053.
    assert 0.90 <= covered <= 1.0


def test_independent_interval_is_far_too_wide(studies: list[tuple[float, ...]]) -> None:
    assert np.mean([low <= TRUTH <= high for _, _, low, high in studies]) > 0.98
    assert np.median([d - c for _, _, c, d in studies]) > 2 * np.median([b - a for a, b, _, _ in studies])


def test_paired_bootstrap_covers() -> None:
    hits = []
    for seed in range(60):
        cells, fitted = draw(seed, rungs=6, seeds=3)
        draws = log_ratio(fitted, bootstrap(fitted, cells.cell, resamples=300, seed=seed))
        low, high = percentile(draws, log_ratio(fitted, fitted.theta))
        hits.append(low[0] <= TRUTH <= high[0])
    assert 0.85 <= np.mean(hits) <= 1.0


def test_rows_of_checkpoints_as_independent_are_too_narrow() -> None:
    from analysis.single_arm.fit_arm import fit_arm

    generator = np.random.default_rng(0)
    frame = ladder({"a": MOONLIGHT_LINES["adamw"]}, rungs=40, shared=0.004)
    rows = []
    for run, end in enumerate(frame.to_dict("records")):
        for part in np.linspace(0.3, 1.0, 20):
            flops = end["flops"] * part
            drift = np.log(end["loss"]) - np.log(MOONLIGHT_LINES["adamw"].loss(end["flops"] / 8.64e19))
            loss = MOONLIGHT_LINES["adamw"].loss(flops / 8.64e19) * np.exp(drift + 0.0003 * generator.standard_normal())
            rows.append({**end, "run": run, "tokens": end["tokens"] * part, "flops": flops, "loss": loss})
    import pandas as pd

    table = pd.DataFrame(rows)
    clustered = fit_arm(table, "power", checkpoints=True, resamples=300)
    naive = fit_arm(table.drop(columns=["run", "cell"]), "power", checkpoints=True, resamples=300)
    errors = [{p.name: p.error for p in found.parameters}["exponent"] for found in (clustered, naive)]
    assert errors[0] > 3 * errors[1]
    assert clustered.units == 40
    assert clustered.effective < 100


def test_resampling_in_one_step_is_close_to_refitting() -> None:
    from analysis.data.cells import Rows
    from analysis.fitting.fit import solve
    from analysis.fitting.laws import LAWS
    from analysis.fitting.objective import HUBER
    from analysis.uncertainty import intervals

    generator = np.random.default_rng(4)
    params = np.exp(generator.uniform(17, 22, 300))
    tokens = params * np.exp(generator.uniform(1, 5, 300))
    columns = {"params": params, "tokens": tokens, "flops": 6 * params * tokens}
    form = LAWS["surface"]
    noise = np.repeat(0.004 * generator.standard_normal(60), 5) + 0.001 * generator.standard_normal(300)
    rows = Rows(np.zeros(300, dtype=np.intp), form.example.evaluate(columns) * np.exp(noise), columns)
    fitted = solve(form, rows, HUBER)
    groups = np.repeat(np.arange(60), 5)
    whole = bootstrap(fitted, groups, resamples=300)
    before = intervals.MAX_REFIT_WORK
    try:
        intervals.MAX_REFIT_WORK = 0
        step = bootstrap(fitted, groups, resamples=300)
    finally:
        intervals.MAX_REFIT_WORK = before
    assert np.std(step, axis=0) == pytest.approx(np.std(whole, axis=0), rel=0.35)


def test_difference_line_is_the_textbook_regression() -> None:
    from scipy.stats import linregress

    cells, _ = draw(3)
    found = difference(cells)
    assert found is not None
    one, two = (cells.rows.loss[cells.rows.arm == arm] for arm in (0, 1))
    x = np.log(cells.rows.columns["flops"][cells.rows.arm == 0] / 8.64e19)
    expected = linregress(x, np.log(one / two))
    assert (found.slope, found.p) == pytest.approx((expected.slope, expected.pvalue))


@pytest.mark.parametrize("columns", [["cell", "seed"], ["cell"]])
def test_seeds_that_share_a_named_cell_count_as_noise(columns: list[str]) -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}, seeds=3, shared=0.004, own=0.001)
    apart = fit_table(frame).comparisons[0]
    shared = frame.assign(cell=frame["cell"].str[0]).drop(columns=[c for c in ("cell", "seed") if c not in columns])
    together = fit_table(shared).comparisons[0]
    assert together.cells == 15
    assert together.headline == apart.headline


def test_no_interval_has_width_zero() -> None:
    base = ladder({"adamw": ADAMW}, shared=0.004)
    same = pd.concat([base, base.assign(arm="copy")], ignore_index=True)
    for frame in (same, ladder({"adamw": ADAMW, "muon": MUON})):
        comparison = fit_table(frame, family="lines").comparisons[0]
        assert comparison.headline.low is None
        assert "there is no noise" in comparison.interval
        assert all(found.high > found.low and found.method == "t, arms independent" for found in comparison.intervals)
        assert all(found.low is None for found in comparison.definitions)
    copied = fit_table(same).comparisons[0].difference
    assert copied is not None
    assert copied.p == 1.0


def test_normal_resamples_have_the_spread_of_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}, rungs=8, seeds=30, shared=0.004, own=0.001)
    cells = select(check_table(frame), ("adamw", "muon"))
    fitted = fit_family(LAW_FAMILIES["lines"], cells.rows, 2)
    drawn = bootstrap(fitted, cells.cell, resamples=2000), wild(fitted, cells, resamples=2000, seed=0)
    for module in ("analysis.uncertainty.intervals", "analysis.uncertainty.robustness"):
        monkeypatch.setattr(f"{module}.MAX_RESAMPLED_GROUPS", 100)
    monkeypatch.setattr("analysis.uncertainty.intervals.MAX_REFIT_WORK", 1.0)
    normal = bootstrap(fitted, cells.cell, resamples=2000), wild(fitted, cells, resamples=2000, seed=0)
    for one, two in zip(drawn, normal, strict=True):
        # Standard deviations over 2,000 draws are known to 1.6 %.
        assert two.std(axis=0) == pytest.approx(one.std(axis=0), rel=0.1)
        assert two.mean(axis=0) == pytest.approx(one.mean(axis=0), abs=float(one.std(axis=0).max()) / 5)
