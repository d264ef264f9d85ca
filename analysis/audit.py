"""Is the comparison fair? The checks that a sceptic would run, each with its evidence and what would mend it.

A check that cannot see what it needs says so with a warning: silence in a table is not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from analysis.cells import run_of
from analysis.compare import Comparison
from analysis.match import compute_law
from analysis.study import Study
from analysis.summary import compute_unit
from scaling.spec import Strict

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["pass", "warn", "fail"]


class Check(Strict, frozen=True):
    """One question put to a study."""

    name: str
    """Row of `CHECKS`."""
    question: str
    verdict: Verdict
    evidence: str
    remedy: str
    """What would turn it into a pass; empty where it is one."""


class Finding(NamedTuple):
    """What a check found."""

    verdict: Verdict
    evidence: str
    remedy: str = ""


class Case(NamedTuple):
    """What a check may look at."""

    frame: pd.DataFrame
    """Rows of the study's arms."""
    used: pd.DataFrame
    """Rows that the fits used."""
    study: Study


def audit(frame: pd.DataFrame, study: Study) -> list[Check]:
    """All checks of `CHECKS` on a study and the table it was made from.

    Args:
        frame: The checked table (`analysis.load.read_table`).
        study: What ``analysis.study.fit_table`` gave for it.
    """
    frame = frame[frame["arm"].isin(study.arms)]
    rows = sorted({row - 1 for c in study.comparisons for fit in c.fits.values() for row in fit.rows})
    case = Case(frame, frame.loc[rows], study)
    made = []
    for name, (question, check) in CHECKS.items():
        found = check(case)
        made.append(
            Check(name=name, question=question, verdict=found.verdict, evidence=found.evidence, remedy=found.remedy)
        )
    return made


def _search(case: Case) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Peak learning rates tried, with their losses, by arm and size."""
    frame = case.frame[case.frame["left_out"] == ""]
    if "peak_lr" not in frame or not frame["peak_lr"].notna().any():
        return {}
    last = frame.assign(run_=run_of(frame)).sort_values("tokens", kind="stable").groupby("run_", sort=False).tail(1)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (arm, params), group in last.groupby(["arm", "params"], sort=True):
        best = group.groupby("peak_lr")["loss"].min()
        found[str(arm), f"{params:.4g}"] = [(float(str(lr)), float(loss)) for lr, loss in best.items()]
    return found


def _edge(case: Case) -> Finding:
    searched = {key: tried for key, tried in _search(case).items() if len(tried) >= 3}
    if not searched:
        return Finding(
            "warn",
            "the table shows no search over learning rates (no size with three or more values of peak_lr), so nothing "
            "says that either arm stands at its optimum",
            "Sweep the learning rate of both arms at two sizes at least, and keep the losers in the table.",
        )
    edges = [
        f"{arm} at N = {size}: best peak_lr {best:.3g} of {tried[0][0]:.3g} to {tried[-1][0]:.3g}"
        for (arm, size), tried in searched.items()
        if (best := min(tried, key=lambda pair: pair[1])[0]) in (tried[0][0], tried[-1][0])
    ]
    if edges:
        return Finding("fail", "; ".join(edges), "Widen the search until the best value has a worse one on both sides.")
    return Finding("pass", f"best learning rate inside the search in all {len(searched)} sweeps")


def _tuning(case: Case) -> Finding:
    searched = _search(case)
    if not searched:
        return Finding(
            "warn",
            "the table has no column peak_lr; what was tried for each arm is not known",
            "Record the settings of every run, the discarded ones too.",
        )
    tried = {arm: sum(len(v) for (a, _), v in searched.items() if a == arm) for arm in case.study.arms}
    told = ", ".join(f"{arm} {count}" for arm, count in tried.items())
    if max(tried.values()) > min(tried.values()):
        return Finding(
            "fail",
            f"different numbers of settings tried: {told}",
            "Give every arm the same budget of trials at every size; a retuned baseline alone has been worth a factor of two.",
        )
    if max(tried.values()) == len({size for _, size in searched}):
        return Finding(
            "warn",
            f"one setting for each size in every arm ({told})",
            "Show that neither arm's setting was better tuned.",
        )
    return Finding("pass", f"equal numbers of settings tried: {told}")


def _finished(case: Case) -> Finding:
    frame = case.frame
    if "status" in frame:
        states = frame["status"].astype(object).fillna("finished").astype(str)
        open_ = states[states.isin(["planned", "queued", "running", "preempted"])]
        if len(open_):
            return Finding(
                "warn",
                f"{len(open_)} of {len(frame)} runs are not finished ({', '.join(sorted(set(open_)))}) and were left out",
                "Finish them, then fit again.",
            )
    middle = [out for out in case.study.left_out if "checkpoint" in out.reason]
    if middle:
        return Finding("pass", "checkpoints before the end of a run are in the table and were left out of the ratio")
    ranks = case.used.groupby(["arm", "params"])["tokens"].nunique()
    if "run" not in frame and (ranks > 3).any():
        where = ranks.reset_index().sort_values("tokens", ascending=False, kind="stable").iloc[0]
        return Finding(
            "warn",
            f"{where['arm']} has {int(ranks.max())} token counts for one size N = {where['params']:.4g} and the table has no column "
            "run: these may be points of one run before its learning rate had decayed",
            "Add a column run. Compare ends of schedules only.",
        )
    return Finding("pass", "every run that was used stands in the table once, at its end")


def _held_out(case: Case) -> Finding:
    used = case.used
    remedy = "Measure every run on one fixed set of held-out tokens."
    if "loss_kind" in used and used["loss_kind"].astype(str).str.contains("train").any():
        return Finding("fail", "the column loss_kind says training loss", remedy)
    if "train_loss" in used and used["train_loss"].notna().any():
        same = np.isclose(used["loss"], used["train_loss"], rtol=1e-9).mean()
        if same > 0.5:
            return Finding("fail", f"loss equals train_loss in {same:.0%} of the rows", remedy)
        return Finding("pass", "the table has a training loss of its own, and the fitted loss is another")
    return Finding("warn", "nothing in the table says on which tokens the loss was measured", remedy)


def _seeds(case: Case) -> Finding:
    remedy = "Repeat two sizes at least with three seeds: the noise of one run sets what a ratio can mean."
    if "seed" not in case.used:
        return Finding("warn", "no column seed: no run is known to be repeated", remedy)
    again = case.used.groupby(["arm", "params", "tokens"])["seed"].nunique()
    repeated = int((again > 1).sum())
    if not repeated:
        return Finding("warn", "one seed at every point; the noise of a run was not measured", remedy)
    spread = case.used.groupby(["arm", "params", "tokens"])["loss"].std().dropna()
    note = f"; standard deviation over seeds {float(spread.median()):.4f} nats" if len(spread) else ""
    sizes = case.used.loc[case.used.groupby("params")["seed"].transform("nunique") > 1, "params"].nunique()
    if sizes < 2:
        return Finding("warn", f"seeds at one size alone{note}", remedy)
    return Finding("pass", f"{repeated} points with several seeds at {sizes} sizes{note}")


def _extrapolated(case: Case) -> Finding:
    heads = [(c.challenger, c.headline) for c in case.study.comparisons]
    bad = [
        f"{arm}: {point.support} at loss {point.loss:.4g}" for arm, point in heads if point.support != "interpolated"
    ]
    if bad:
        return Finding("fail", "; ".join(bad), "Train the arm that falls short until both reach the loss.")
    arrows = [d for c in case.study.comparisons for d in c.definitions if d.support != "interpolated"]
    note = f" ({', '.join(sorted({d.name for d in arrows}))}: beyond the runs, and marked so)" if arrows else ""
    return Finding("pass", f"the headline's loss is inside both arms' runs{note}")


def trend(comparison: Comparison) -> dict[str, float]:
    """Change of the ln ratio for each decade of compute over the runs, by family of laws."""
    losses = [point.loss for point in comparison.rungs]
    found = {}
    for model in comparison.models:
        laws = [compute_law(model.laws[arm]) for arm in (comparison.baseline, comparison.challenger)]
        ends = [loss for loss in (max(losses), min(losses)) if loss > max(law.floor for law in laws)]
        if len(ends) < 2 or min(law.exponent for law in laws) <= 0:
            continue
        logs = [np.log(laws[1].compute(loss) / laws[0].compute(loss)) for loss in ends]
        span = np.log10(laws[0].compute(ends[1]) / laws[0].compute(ends[0]))
        found[model.family] = float((logs[1] - logs[0]) / span) if span > 0 else 0.0
    return found


def _floor(case: Case) -> Finding:
    for comparison in case.study.comparisons:
        found = {key: value for key, value in trend(comparison).items() if abs(value) > 0.01}
        if found and min(found.values()) < 0 < max(found.values()):
            down, up = min(found, key=lambda k: found[k]), max(found, key=lambda k: found[k])
            return Finding(
                "warn",
                f"{comparison.challenger}: by {down} the ratio falls {-found[down]:.0%} for each decade of compute, by {up} it "
                f"rises {found[up]:.0%}; the data do not tell which",
                "Say nothing about the trend, or add rungs until one law predicts held-out rungs clearly better.",
            )
    return Finding("pass", "the ratio's trend has the same sign under every law that was tried, or there is none")


def _spread(case: Case) -> Finding:
    worst = Finding("pass", "other laws give a ratio inside the interval")
    for comparison in case.study.comparisons:
        head = comparison.headline
        ratios = [m.ratio for m in comparison.models if m.ratio is not None]
        if head.low is None or head.high is None:
            return Finding("fail", f"{comparison.challenger}: no interval: {comparison.interval}", "Add cells.")
        if ratios and (min(ratios) < head.low or max(ratios) > head.high):
            worst = Finding(
                "warn",
                f"{comparison.challenger}: other laws give {min(ratios):.3g} to {max(ratios):.3g}, beyond the interval "
                f"{head.low:.3g} to {head.high:.3g}",
                "Quote the spread beside the interval.",
            )
    return worst


def _leans(case: Case) -> Finding:
    told = []
    for comparison in case.study.comparisons:
        head = comparison.headline
        if head.low is None or head.high is None or not comparison.jackknife:
            continue
        ratios = [(item.ratio, item.compute) for item in comparison.jackknife if item.ratio is not None]
        if len(ratios) < len(comparison.jackknife):
            return Finding(
                "warn",
                f"{comparison.challenger}: without one of the rungs the laws no longer reach the headline's loss",
                "Train more rungs.",
            )
        far, compute = max(ratios, key=lambda pair: abs(np.log(pair[0] / head.ratio)))
        unit, size = compute_unit(comparison)
        text = f"{comparison.challenger}: {far:.3g} without the rung at {compute * size:.3g} {unit}, {head.ratio:.3g} with it"
        if not head.low <= far <= head.high or abs(np.log(far / head.ratio)) > np.log(1.15):
            return Finding("warn", text, "Look at the runs of that rung; repeat them with other seeds.")
        told.append(text)
    if not told:
        return Finding("warn", "too few rungs to leave one out", "Train at least four.")
    return Finding("pass", "; ".join(told))


def _pairs(case: Case) -> Finding:
    for comparison in case.study.comparisons:
        if comparison.paired_cells < comparison.cells:
            return Finding(
                "warn",
                f"{comparison.challenger}: {comparison.paired_cells} of {comparison.cells} cells have a run of both arms",
                "Train every cell with both arms on the same tokens in the same order.",
            )
    used = case.used
    if "manifest" in used and len({frozenset(part["manifest"].astype(str)) for _, part in used.groupby("arm")}) > 1:
        return Finding("fail", "the arms read different data (column manifest)", "Train both on the same shards.")
    if "cell" in used and "batch_tokens" in used and (used.groupby("cell")["batch_tokens"].nunique() > 1).any():
        return Finding(
            "warn",
            "batch sizes differ between the arms of a cell: with them the order of tokens",
            "Compare at one batch size, and at each arm's best.",
        )
    if "manifest" in used and "seed" in used:
        return Finding("pass", "same cells, same data and same seeds in both arms")
    low = [c.correlation for c in case.study.comparisons if c.correlation is not None]
    note = f"; residuals within a cell correlate {min(low):.2f}" if low else ""
    return Finding(
        "warn" if not low or min(low) < 0.5 else "pass",
        f"same cells in both arms{note}; the table does not say whether the tokens came in the same order",
        "" if low and min(low) >= 0.5 else "Give cells, seeds and the data's manifest as columns.",
    )


def _diverged(case: Case) -> Finding:
    bad = case.frame[~case.frame["left_out"].isin([""]) & ~case.frame["left_out"].str.startswith("the same row")]
    if len(bad):
        by = ", ".join(f"{arm} {count}" for arm, count in bad["arm"].value_counts(sort=False).items())
        lost = bad["left_out"].str.contains("diverged|failed").sum()
        return Finding(
            "warn" if lost else "pass",
            f"{len(bad)} runs are in the table without a usable loss ({by}), {lost} of them diverged or failed, and are named",
            "Repeat them with the arm's next lower learning rate, or say in the text what they mean." if lost else "",
        )
    if "status" in case.frame:
        return Finding("pass", "the table has a column status and no run without a loss")
    return Finding(
        "warn",
        "no column status: runs that diverged may have been taken out before",
        "Keep every run in the table, with status diverged where there is no loss.",
    )


def _convention(case: Case) -> Finding:
    used = case.used
    ratio = (used["flops"] / (6.0 * used["params"] * used["tokens"])).to_numpy()
    others = sorted({c.label for comparison in case.study.comparisons for c in comparison.conventions})
    note = f"; the ratio is also given in {', '.join(others)}" if others else ""
    if "convention" in used and used["convention"].notna().all():
        return Finding("pass", f"named in the table: {', '.join(sorted(set(used['convention'].astype(str))))}{note}")
    if np.all(np.abs(ratio - 1.0) <= 0.01):
        if others:
            return Finding("pass", f"flops are 6 * params * tokens{note}")
        return Finding(
            "warn",
            "flops are 6 * params * tokens; which weights params counts (embedding, head) is not said",
            "Add a column convention, and columns such as flops_attention: the count has moved this ratio by a tenth.",
        )
    return Finding(
        "warn",
        f"flops are {ratio.min():.3g} to {ratio.max():.3g} times 6 * params * tokens and no column says what they count",
        "Add a column convention that names the count.",
    )


def _reach(case: Case) -> Finding:
    told, bad = [], False
    for arm in case.study.arms:
        flops = case.used.loc[case.used["arm"] == arm, "flops"]
        decades, points = float(np.log10(flops.max() / flops.min())), flops.round(-1).nunique()
        told.append(f"{arm} {points} computes over {decades:.1f} decades")
        bad = bad or decades < 1.5 or points < 5
    return Finding(
        "warn" if bad else "pass",
        "; ".join(told),
        "Five computes over a decade and a half are the least from which a curve can be told from a line."
        if bad
        else "",
    )


def _converged(case: Case) -> Finding:
    fits = [fit for c in case.study.comparisons for fit in c.fits.values()]
    bad = [fit for fit in fits if fit.status != "converged"]
    if bad:
        return Finding("fail", " ".join(fit.remark for fit in bad), "Use a law with fewer parameters, or add runs.")
    worst = max(fit.certificate.gap for fit in fits)
    agree = min(fit.certificate.agreeing for fit in fits)
    return Finding("pass", f"every fit is at its minimum (gap at most {worst:.0e}; {agree:.0%} of the starts agree)")


def _time(case: Case) -> Finding:
    if any(
        c.column in ("seconds", "gpu_hours") for comparison in case.study.comparisons for c in comparison.conventions
    ):
        return Finding("pass", "a ratio in measured time stands beside the one in FLOPs")
    return Finding(
        "warn",
        "no measured time: FLOPs of the model leave out what an optimizer itself costs",
        "Add a column seconds, measured on one kind of device.",
    )


CHECKS: dict[str, tuple[str, Callable[[Case], Finding]]] = {
    "search-edge": ("Does the best learning rate have worse ones on both sides?", _edge),
    "equal-tuning": ("Was every arm tuned with the same effort?", _tuning),
    "finished": ("Are only ends of schedules compared?", _finished),
    "held-out": ("Is the loss measured on held-out tokens?", _held_out),
    "seeds": ("Is the noise of a run known?", _seeds),
    "headline": ("Is the headline inside the runs?", _extrapolated),
    "trend": ("Does the ratio's trend survive another law?", _floor),
    "law-spread": ("Do other laws agree within the interval?", _spread),
    "one-rung": ("Does the ratio stand without any one rung?", _leans),
    "pairs": ("Did both arms see the same tokens in the same order?", _pairs),
    "missing-runs": ("Are runs that failed still in the table?", _diverged),
    "convention": ("Is it said what the FLOPs count?", _convention),
    "reach": ("Are there enough sizes, far enough apart?", _reach),
    "minimum": ("Is every fit the minimum it claims to be?", _converged),
    "time": ("Is there a ratio in measured time?", _time),
}
"""What is asked of every comparison, in the order of the report."""


def audit_text(checks: list[Check]) -> str:
    """The checks as lines for the terminal."""
    lines = []
    for check in checks:
        lines.append(
            f"{check.verdict.upper():4}  {check.question} {check.evidence}."
            + (f" {check.remedy}" if check.remedy else "")
        )
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("pass", "warn", "fail")}
    return "\n".join([*lines, f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail."])
