"""Progress of a run: step, loss and speed on a bar or in a log."""

from __future__ import annotations

import contextlib
import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from scaling.run.progress import ProgressReporter
from scaling.spec import RunSpec
from scaling.units import human


class ProgressCallback(Callback):
    """Passes the steps of a run to a `ProgressReporter`, in its first process.

    Args:
        spec: The run.
        name: Name of the run in the output.
        bar: As in `ProgressReporter`.
    """

    def __init__(self, spec: RunSpec, *, name: str, bar: bool | None = None) -> None:
        self.spec = spec
        self.reporter = ProgressReporter(name, total=spec.steps, unit="steps", bar=bar)
        self._open = contextlib.ExitStack()
        self._shown_at, self._shown_step = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        if trainer.is_global_zero:
            self._open.enter_context(self.reporter)
            self._shown_at, self._shown_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the step if it will be shown: reading the loss makes the host wait for the GPU."""
        if not trainer.is_global_zero or not self.reporter.due:
            return
        now, step, loss = time.monotonic(), trainer.global_step, float(cast(Any, pl_module).last_loss)
        rate = (step - self._shown_step) * self.spec.batch_tokens / (now - self._shown_at)
        self.reporter.update(step, loss=f"{loss:.4f}", speed=f"{human(rate)} tokens/s")
        self._shown_at, self._shown_step = now, step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._open.close()
