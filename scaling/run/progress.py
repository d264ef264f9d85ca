"""Progress of long work: a bar on a terminal, otherwise a line now and then. Imports rich only to draw a bar."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from scaling.console import console
from scaling.units import human

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 60.0
"""Seconds between two lines in a log."""

BAR_SECONDS = 0.5
"""Seconds between two changes of a bar."""


class ProgressReporter:
    """Context manager that shows how far a piece of work is.

    ::

        with ProgressReporter("scoring", total=10_000, unit="tokens") as reporter:
            reporter.update(2_500, loss="3.21")

    prints ``scoring: 2.5k of 10k tokens (25%), loss 3.21``. Work that consists of parallel parts, such as the runs of a
    campaign, also calls `update_part` for each of them, before `update`.

    Args:
        name: The work.
        total: Amount of work; None if it is not known.
        unit: Unit of `total`. Without one only the percentage is shown.
        bar: A bar (True), lines (False), or a bar if stderr is a terminal (None).
    """

    def __init__(self, name: str, total: float | None = None, unit: str = "", *, bar: bool | None = None) -> None:
        self.name, self.total, self.unit = name, total, unit
        self._parts: dict[str, str] = {}
        self._completed: float | None = None
        self._last = ""
        self._shown_at = 0.0
        self._bar: Progress | None = None
        self._part_tasks: dict[str, TaskID] = {}
        if sys.stderr.isatty() if bar is None else bar:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                console=console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, text="")

    def __enter__(self) -> Self:
        self._shown_at = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw(self._bar)
            self._bar.stop()

    @property
    def due(self) -> bool:
        """True if the next `update` will be shown; fields that are expensive to compute are needed only then."""
        return time.monotonic() - self._shown_at >= (LINE_SECONDS if self._bar is None else BAR_SECONDS)

    def update(self, completed: float | None, **fields: str) -> None:
        """Show the state of the work, if it is time to.

        Args:
            completed: Work done so far, in units of `total`; None if it is not known.
            fields: Further values by name, such as ``loss="3.21"``; an underscore is shown as a space.
        """
        self._completed, self._last = completed, _text(completed, self.total, self.unit, fields)
        if not self.due:
            return
        self._shown_at = time.monotonic()
        if self._bar is None:
            parts = [f"{name} {text}" for name, text in self._parts.items()]
            self.print(f"{self.name}: {'; '.join([self._last, *parts])}")
        else:
            self._draw(self._bar)

    def _draw(self, bar: Progress) -> None:
        done, total = (0.0, None) if self._completed is None else (self._completed, self.total)
        bar.update(self._task, description=self.name, completed=done, total=total, text=self._last)

    def update_part(self, name: str, completed: float, **fields: str) -> None:
        """Set the state of one part: its share done, from 0 to 1, and further values."""
        self._parts[name] = text = _text(completed, 1.0, "", fields)
        if self._bar is not None:
            if name not in self._part_tasks:
                self._part_tasks[name] = self._bar.add_task(name, total=1.0, text="")
            self._bar.update(self._part_tasks[name], completed=completed, text=text)

    def remove_part(self, name: str) -> None:
        """Stop showing a part, for instance because it ended."""
        self._parts.pop(name, None)
        if self._bar is not None and name in self._part_tasks:
            self._bar.remove_task(self._part_tasks.pop(name))

    def print(self, sentence: str) -> None:
        """Print a line, above the bars if there are any."""
        if self._bar is not None:
            self._bar.console.print(sentence, highlight=False)
        else:
            print(sentence, file=sys.stderr, flush=True)


def _text(completed: float | None, total: float | None, unit: str, fields: dict[str, str]) -> str:
    values = [f"{name.replace('_', ' ')} {value}" for name, value in fields.items()]
    if completed is not None:
        share = f"{completed / total:.0%}" if total else ""
        amount = f"{human(completed)}{f' of {human(total)}' if total else ''} {unit}{f' ({share})' if share else ''}"
        values.insert(0, amount if unit else share)
    return ", ".join(filter(None, values))
