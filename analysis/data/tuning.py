"""The search for settings behind a table: its trials, the ratio at smaller search budgets, notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class TuningTables(NamedTuple):
    """Trials and budgets of a search for settings."""

    trials: pd.DataFrame
    """The runs of the search, a checked table's frame."""
    budget: pd.DataFrame | None = None
    """The match ratio at smaller budgets: columns arm, baseline, against (``equal``: both arms have so many trials,
    ``full``: the baseline alone), trials, ratio, low, high."""
    notes: tuple[str, ...] = ()
    """Sentences for the report: what was spent, laws, what transfer costs."""
