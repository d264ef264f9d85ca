"""Checks of the search for settings: interior optima, equal effort, and distance of the runs from the tuned sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.audit import Case, Finding
from analysis.data.cells import run_of

if TYPE_CHECKING:
    import pandas as pd

MAX_TRANSFER_FACTOR = 3.0
"""Growth of compute beyond the tuned sizes that passes."""
MAX_DOUBTFUL_TRANSFER_FACTOR = 30.0
"""Growth of compute that warns; above, the check fails. An exponent of a learning rate's law that is 0.1 off, which a few
small sizes cannot exclude, moves the rate by a tenth at a factor of 3 and by 40 % at 30."""
MIN_RATES_OF_SEARCH = 3
"""Values of a learning rate at one size that make a search."""


def _searches(case: Case) -> pd.DataFrame:
    """The last row of every run that is part of a search, with columns arm, params, peak_lr, loss, flops."""
    table = case.frame[case.frame["left_out"] == ""] if case.trials is None else case.trials
    if "peak_lr" not in table or not table["peak_lr"].notna().any():
        return table.iloc[:0].assign(peak_lr=[])
    table = table[table["loss"].notna()]
    return table.assign(run_=run_of(table)).sort_values("tokens", kind="stable").groupby("run_", sort=False).tail(1)


def _tried(case: Case) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Peak learning rates tried, with their best losses, by arm and size."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (arm, params), group in _searches(case).groupby(["arm", "params"], sort=True):
        best = group.groupby("peak_lr")["loss"].min()
        found[str(arm), f"{params:.4g}"] = [(float(str(lr)), float(loss)) for lr, loss in best.items()]
    return found


def interior_optimum(case: Case) -> Finding:
    """The best learning rate of every search has worse ones on both sides."""
    searched = {key: tried for key, tried in _tried(case).items() if len(tried) >= MIN_RATES_OF_SEARCH}
    if not searched:
        return Finding(
            "warn",
            "the table shows no search over learning rates (no size with three or more values of peak_lr), so neither "
            "arm is known to be at its optimum",
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


def equal_effort(case: Case) -> Finding:
    """Every arm had the same number of settings tried."""
    searched = _tried(case)
    if not searched:
        return Finding(
            "warn",
            "the table has no column peak_lr; the settings tried for each arm are not known",
            "Record the settings of every run, the discarded ones too.",
        )
    tried = {arm: sum(len(v) for (a, _), v in searched.items() if a == arm) for arm in case.study.arms}
    if case.trials is not None:
        tried = {arm: int((case.trials["arm"] == arm).sum()) for arm in case.study.arms}
    counted = ", ".join(f"{arm} {count}" for arm, count in tried.items())
    counts = {count for count in tried.values() if count}
    if len(counts) > 1:
        return Finding(
            "fail",
            f"different numbers of settings tried: {counted}",
            "Give every arm the same budget of trials at every size; a retuned baseline alone has been worth a factor of two.",
        )
    if case.trials is None and max(counts) == len({size for _, size in searched}):
        evidence = f"one setting for each size in every arm ({counted})"
        return Finding("warn", evidence, "Show that neither arm's setting was better tuned.")
    without = [arm for arm, count in tried.items() if not count]
    if without:
        return Finding(
            "warn",
            f"{', '.join(without)} had no search of its own; settings tried: {counted}",
            "Its loss at its own best settings is not known; quote a searched arm beside it.",
        )
    return Finding("pass", f"equal numbers of settings tried: {counted}")


def tuned_range(case: Case) -> Finding:
    """The compute of the runs stays near the compute at which settings were searched."""
    rows = _searches(case)
    rows = rows[rows.groupby(["arm", "params"])["peak_lr"].transform("nunique") >= MIN_RATES_OF_SEARCH]
    if not len(rows):
        evidence = "no search is in the table, so the sizes at which the settings were found are not known"
        return Finding("warn", evidence, "Keep all runs of the search.")
    worst, reached = 1.0, []
    for arm in case.study.arms:
        own = rows.loc[rows["arm"] == arm, "flops"]
        tuned = own if len(own) else rows["flops"]  # another arm's settings
        used = case.used.loc[case.used["arm"] == arm, "flops"]
        times = max(float(used.max() / tuned.max()), float(tuned.min() / used.min()), 1.0)
        reached.append(f"{arm} up to {times:.3g} times" if times > 1.01 else f"{arm} inside")
        worst = max(worst, times)
    evidence = f"beyond the compute that was searched: {', '.join(reached)}"
    if worst <= MAX_TRANSFER_FACTOR:
        return Finding("pass", evidence)
    remedy = "Tune a rung nearer to the largest, or hold one out and report what its transfer costs."
    return Finding("warn" if worst <= MAX_DOUBTFUL_TRANSFER_FACTOR else "fail", evidence, remedy)
