"""The console that tables are printed to."""

from __future__ import annotations

from rich.console import Console


def wide_enough(console: Console) -> Console:
    """The console, or one of 120 columns where the output is no terminal and nothing says how wide it is."""
    return console if console.is_terminal else Console(width=120)
