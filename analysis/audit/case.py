"""What a check may look at, and what it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from analysis.ratio.study import Study

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["pass", "warn", "fail"]


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
    trials: pd.DataFrame | None
    """Runs of the search for settings, where they are not in the table itself."""
