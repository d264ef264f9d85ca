"""A run's progress for the person who watches it: a bar on a terminal, a plain line a minute in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from scaling.spec import RunSpec
from scaling.units import human

LINE_SECONDS = 60.0
BAR_SECONDS = 0.5


class ProgressLine(Callback):
    """Shows step, loss and speed.

    Args:
        spec: The run's.
        name: How the run is called on the line.
        bar: A bar (True), lines (False), or a bar where the output is a terminal (None).
    """

    def __init__(self, spec: RunSpec, *, name: str, bar: bool | None = None) -> None:
        self.spec = spec
        self.name = name
        self.every = BAR_SECONDS if (sys.stderr.isatty() if bar is None else bar) else LINE_SECONDS
        self.bar = None
        self._shown_at = self._shown_step = 0.0
        if self.every == BAR_SECONDS:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
        self._open = contextlib.ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._shown_at, self._shown_step = time.monotonic(), trainer.global_step
        if self.bar is not None and trainer.is_global_zero:
            self._open.enter_context(self.bar)
            self._task = self.bar.add_task(self.name, total=self.spec.steps, completed=trainer.global_step, loss="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or write a line when a minute has passed."""
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._shown_at < self.every:
            return
        step, loss = trainer.global_step, float(cast(Any, pl_module).last_loss)
        if self.bar is not None:
            self.bar.update(self._task, completed=step, loss=f"loss {loss:.3f}")
        else:
            rate = (step - self._shown_step) * self.spec.batch_tokens / (now - self._shown_at)
            print(
                f"{self.name}: step {step:,}/{self.spec.steps:,}, loss {loss:.4f}, {human(rate)} tokens/s",
                file=sys.stderr,
                flush=True,
            )
        self._shown_at, self._shown_step = now, step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None and trainer.is_global_zero:
            self.bar.update(self._task, completed=trainer.global_step)
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._open.close()
