"""Fairness audit: the checks that a sceptic would run on a comparison, each with its evidence and a remedy.

A check that lacks the columns it needs warns: missing evidence is not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from analysis.ratio.study import Study
from scaling.io import Strict
from scaling.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["pass", "warn", "fail"]


class Case(NamedTuple):
    """Input of a check."""

    frame: pd.DataFrame
    """Rows of the study's arms."""
    used: pd.DataFrame
    """Rows that the fits used."""
    study: Study
    trials: pd.DataFrame | None
    """Runs of the search for settings, where they are not in the table itself."""


class Finding(NamedTuple):
    """Result of a check."""

    verdict: Verdict
    evidence: str
    remedy: str = ""
    """The change that would turn it into a pass; empty where it is one."""


class Check(NamedTuple):
    """Row of `CHECKS`."""

    question: str
    run: Callable[[Case], Finding]


class AuditCheck(Strict, frozen=True):
    """One check with its finding, as ``audit --json`` prints it."""

    name: str
    """Row of `CHECKS`."""
    question: str
    verdict: Verdict
    evidence: str
    remedy: str


from analysis.audit import laws, runs, tuning  # noqa: E402 - the checks import the types above

CHECKS: Registry[Check] = Registry(
    "check",
    "checks",
    {
        "search-edge": Check("Does the best learning rate have worse ones on both sides?", tuning.interior_optimum),
        "equal-tuning": Check("Was every arm tuned with the same effort?", tuning.equal_effort),
        "tuned-range": Check("Do the settings stay near the sizes at which they were tuned?", tuning.tuned_range),
        "finished": Check("Are only ends of schedules compared?", runs.finished),
        "held-out": Check("Is the loss measured on held-out tokens?", runs.held_out),
        "seeds": Check("Is the noise of a run known?", runs.seeds),
        "headline": Check("Is the headline inside the runs?", laws.headline_inside),
        "trend": Check("Does the ratio's trend survive another law?", laws.trend_sign),
        "law-spread": Check("Do other laws agree within the interval?", laws.law_spread),
        "one-rung": Check("Does the ratio hold without any one rung?", laws.one_rung),
        "pairs": Check("Did both arms see the same tokens in the same order?", runs.pairs),
        "code": Check("Did one version of the code train all runs?", runs.code),
        "missing-runs": Check("Are runs that failed still in the table?", runs.diverged),
        "convention": Check("Does the table say what the FLOPs count?", runs.convention),
        "reach": Check("Are there enough sizes, far enough apart?", laws.reach),
        "minimum": Check("Is every fit the minimum it claims to be?", laws.converged),
        "time": Check("Is there a ratio in measured time?", runs.time),
    },
)
"""All checks, in the order of the report."""


def audit(frame: pd.DataFrame, study: Study, trials: pd.DataFrame | None = None) -> list[AuditCheck]:
    """All checks of `CHECKS` on a study and the table it was made from.

    Args:
        frame: The checked table (`analysis.data.table.read_table`).
        study: Its study (`analysis.ratio.study.fit_table`).
        trials: The checked table of the search for settings (``trials.csv`` of a campaign), where there is one.
    """
    frame = frame[frame["arm"].isin(study.arms)]
    rows = sorted({row - 1 for c in study.comparisons for fit in c.fits.values() for row in fit.rows})
    case = Case(frame, frame.loc[rows], study, trials)
    return [
        AuditCheck(name=name, question=check.question, **check.run(case)._asdict()) for name, check in CHECKS.items()
    ]


def audit_text(checks: list[AuditCheck]) -> str:
    """The checks as lines for the terminal."""
    lines = [f"{c.verdict.upper():4}  {c.question} {c.evidence}. {c.remedy}".rstrip() for c in checks]
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("pass", "warn", "fail")}
    return "\n".join([*lines, f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail."])
