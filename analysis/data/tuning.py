"""What is known of the search for settings behind a table: its trials, what fewer would have given, notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class TuningTables(NamedTuple):
    """A search, told by whoever made it."""

    trials: pd.DataFrame
    """Its runs, a checked table."""
    budget: pd.DataFrame | None = None
    """The match ratio at smaller budgets: columns arm, baseline, against (``equal``: both arms have so many trials,
    ``full``: the baseline alone), trials, ratio, low, high."""
    notes: tuple[str, ...] = ()
    """Sentences for the report: what was spent, laws, what transfer costs."""
