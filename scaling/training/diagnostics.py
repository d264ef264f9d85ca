"""Training dynamics: sizes of updates, attention logits and spectra of weights, measured at chosen steps.

Figures of training dynamics (Moonlight's Tables 1 and 8, Figures 4 and 7) are drawn from the rows in dynamics.jsonl.
Measuring changes nothing. The callback also applies QK-clip, if the optimizer's options request it: it bounds attention
logits after each step, and the size of the update must be measured before it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from scaling.errors import UserError
from scaling.io import append_line, write_lines
from scaling.optim.diagnostics import svd_entropy, update_rms, weights_of
from scaling.optim.registry import qk_clip_bound
from scaling.run.directory import RunDirectory
from scaling.run.record import DynamicsRow
from scaling.spec import Placement, RunSpec
from scaling.training.metrics import MetricsLogger, spread
from scaling.training.qk_clip import QkClip, observed_logits

if TYPE_CHECKING:
    from scaling.training.module import TrainingModule


@torch.no_grad()
def largest_attention_logits(module: TrainingModule, sequences: Tensor) -> dict[str, float]:
    """The largest logit of each attention over a forward pass, by the attention's name in the model.

    Args:
        module: The model with its precision; a collective operation if weights are sharded.
        sequences: Shape ``(sequences, context + 1)``, int64.
    """
    # Hooks do not see the inputs of compiled code, so this pass is eager.
    with (
        torch.compiler.set_stance("force_eager"),
        observed_logits(module.model) as largest,
        module.trainer.precision_plugin.forward_context(),
    ):
        module.model.loss(sequences.to(module.device))
    return {name: float(heads.max()) for name, heads in largest.items()}


class Dynamics(Callback):
    """Callback that measures at `Evaluation.dynamics` steps and applies QK-clip. It runs before `MetricsLogger`, which evaluates."""

    def __init__(self, directory: RunDirectory, spec: RunSpec, placement: Placement, *, metrics: MetricsLogger) -> None:
        bound = qk_clip_bound(spec.optimizer)
        if bound is not None and placement.compile:
            raise UserError(
                f"placement: compile = true, and the optimizer has qk_clip = {bound:g}, which reads the "
                "attention logits of every training pass; compiled code does not expose them. Set compile = false for "
                "this run, or remove qk_clip."
            )
        self.directory, self.spec, self.metrics = directory, spec, metrics
        self.steps = spread(spec.evaluation.dynamics or 0, spec.steps)
        self.clip = None if bound is None else QkClip(bound)
        self._before: list[Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"clipped": self.clip.clipped} if self.clip else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        if self.clip:
            self.clip.clipped = state_dict["clipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows that an earlier attempt wrote after its last checkpoint."""
        if self.clip:
            self.clip.start(cast("TrainingModule", pl_module).model)
        if self.steps and trainer.is_global_zero:
            kept = [row for row in self.directory.dynamics() if row.step <= trainer.global_step]
            write_lines(self.directory.dynamics_file, kept)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the model."""
        if self.clip:
            self.clip.stop()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Copy the weights before a step that is measured."""
        if trainer.global_step + 1 in self.steps:
            with self.metrics.paused():
                self._before = weights_of(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, measure the update, clip, then measure the weights."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        module = cast("TrainingModule", pl_module)
        optimizer = cast("torch.optim.Optimizer", module.optimizers(use_pl_optimizer=False))
        before, self._before = self._before, None
        sizes = None
        if before is not None:
            with self.metrics.paused():
                sizes = update_rms(optimizer, before)
        if self.clip:
            self.clip.after_step(module.maximum_over_processes)
        if sizes is not None:
            with self.metrics.paused():
                logits = largest_attention_logits(module, self.metrics.held_out[: module.evaluation_sequences])
                row = DynamicsRow(
                    step=trainer.global_step,
                    tokens=trainer.global_step * self.spec.batch_tokens,
                    update_rms=_finite(sizes),
                    largest_logit=_finite(logits),
                    svd_entropy=svd_entropy(optimizer),
                    clipped_heads=self.clip.clipped if self.clip else None,
                )
                if trainer.is_global_zero:
                    append_line(self.directory.dynamics_file, row)


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Without values that are not finite, which occur when a run diverges and have no JSON form."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
