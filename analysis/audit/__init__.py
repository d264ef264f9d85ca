"""Is the comparison fair? The checks that a sceptic would run, each with its evidence and what would fix it.

A check that cannot see what it needs says so with a warning: silence in a table is not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from analysis.audit import laws, runs, tuning
from analysis.audit.case import Case, Finding, Verdict
from analysis.ratio.study import Study
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


class AuditCheck(Strict, frozen=True):
    """One question put to a study."""

    name: str
    """Row of `CHECKS`."""
    question: str
    verdict: Verdict
    evidence: str
    remedy: str
    """What would turn it into a pass; empty where it is one."""


def audit(frame: pd.DataFrame, study: Study, trials: pd.DataFrame | None = None) -> list[AuditCheck]:
    """All checks of `CHECKS` on a study and the table it was made from.

    Args:
        frame: The checked table (`analysis.data.table.read_table`).
        study: What ``analysis.ratio.study.fit_table`` gave for it.
        trials: The checked table of the search for settings (``trials.csv`` of a campaign), where there is one.
    """
    frame = frame[frame["arm"].isin(study.arms)]
    rows = sorted({row - 1 for c in study.comparisons for fit in c.fits.values() for row in fit.rows})
    case = Case(frame, frame.loc[rows], study, trials)
    made = []
    for name, (question, check) in CHECKS.items():
        found = check(case)
        made.append(
            AuditCheck(
                name=name, question=question, verdict=found.verdict, evidence=found.evidence, remedy=found.remedy
            )
        )
    return made


CHECKS: dict[str, tuple[str, Callable[[Case], Finding]]] = {
    "search-edge": ("Does the best learning rate have worse ones on both sides?", tuning.edge),
    "equal-tuning": ("Was every arm tuned with the same effort?", tuning.effort),
    "tuned-range": ("Do the settings stay near the sizes at which they were tuned?", tuning.carried),
    "finished": ("Are only ends of schedules compared?", runs.finished),
    "held-out": ("Is the loss measured on held-out tokens?", runs.held_out),
    "seeds": ("Is the noise of a run known?", runs.seeds),
    "headline": ("Is the headline inside the runs?", laws.extrapolated),
    "trend": ("Does the ratio's trend survive another law?", laws.floor),
    "law-spread": ("Do other laws agree within the interval?", laws.spread),
    "one-rung": ("Does the ratio stand without any one rung?", laws.leans),
    "pairs": ("Did both arms see the same tokens in the same order?", runs.pairs),
    "code": ("Did one version of the code train all runs?", runs.code),
    "missing-runs": ("Are runs that failed still in the table?", runs.diverged),
    "convention": ("Is it said what the FLOPs count?", runs.convention),
    "reach": ("Are there enough sizes, far enough apart?", laws.reach),
    "minimum": ("Is every fit the minimum it claims to be?", laws.converged),
    "time": ("Is there a ratio in measured time?", runs.time),
}
"""What is asked of every comparison, in the order of the report."""


def audit_text(checks: list[AuditCheck]) -> str:
    """The checks as lines for the terminal."""
    lines = []
    for check in checks:
        lines.append(
            f"{check.verdict.upper():4}  {check.question} {check.evidence}."
            + (f" {check.remedy}" if check.remedy else "")
        )
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("pass", "warn", "fail")}
    return "\n".join([*lines, f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail."])
