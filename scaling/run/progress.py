"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from scaling.units import human

LINE_SECONDS = 30.0
"""Between two lines in a log."""


class ProgressReporter:
    """A context that shows progress.

    Args:
        label: The work.
        show: None decides by whether stderr is a terminal; True asks for the bar; False is silent.
    """

    def __init__(self, label: str, show: bool | None) -> None:
        self.label = label
        self.silent = show is False
        self._bar = None
        self._next_line = time.monotonic() + LINE_SECONDS
        if not self.silent and (show or sys.stderr.isatty()):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=1.0, counts="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, sentence: str) -> None:
        """One line, unless silent."""
        if self._bar is not None:
            self._bar.console.print(sentence, highlight=False)
        elif not self.silent:
            print(sentence, file=sys.stderr, flush=True)

    def update(self, *, train_tokens: int, validation_tokens: int, done: float | None) -> None:
        """Show where it stands.

        Args:
            train_tokens: Written so far.
            validation_tokens: Written so far.
            done: Share of the work, 0 to 1; None where nobody knows.
        """
        self.show(f"{human(train_tokens)} training tokens, {human(validation_tokens)} held out", done)

    def show(self, counts: str, done: float | None) -> None:
        """Show counts in words, and the share of the work: 0 to 1, None where it is not known."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=None if done is None else 1.0, counts=counts)
        elif not self.silent and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            share = "" if done is None else f" ({done:.0%})"
            self.say(f"{self.label}: {counts}{share}")
