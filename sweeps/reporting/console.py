"""The console that tables are printed to."""

from __future__ import annotations

from rich.console import Console

from scaling.console import console


def wide_enough(found: Console) -> Console:
    """The console, or one of 120 columns where the output is no terminal and nothing says how wide it is."""
    return found if found.is_terminal else console(width=120)
