"""How a run trains, beside how well: sizes of updates, attention logits and spectra of weights, at chosen steps.

The rows in dynamics.jsonl are what figures of training dynamics are made from (Moonlight's Tables 1 and 8, Figures 4
and 7). Measuring reads weights and held-out windows and changes nothing. QK-clip, which bounds attention logits after
every step where the optimizer's options ask for it, happens here too, between the one measurement and the other.
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


def measured_steps(spec: RunSpec) -> set[int]:
    """Steps that are measured: equal distances, and the last."""
    return spread(spec.evaluation.dynamics or 0, spec.steps)


@torch.no_grad()
def largest_attention_logits(module: TrainingModule, windows: Tensor) -> dict[str, float]:
    """The largest logit of each attention over a forward pass of `windows`, by its name in the model.

    Args:
        module: The model with its precision; where weights are sharded, in every process.
        windows: Shape ``(windows, context + 1)``, int64.
    """
    # Compiled code shows no hook its inputs, so this pass is an eager one.
    with (
        torch.compiler.set_stance("force_eager"),
        observed_logits(module.model) as largest,
        module.trainer.precision_plugin.forward_context(),
    ):
        module.model.loss(windows.to(module.device))
    return {name: float(heads.max()) for name, heads in largest.items()}


class Dynamics(Callback):
    """Measures at `measured_steps` and bounds attention logits; stands before the logbook, which evaluates.

    The time of a measurement is taken out of the run's.

    Raises:
        UserError: Logits are to be bounded in a compiled model.
    """

    def __init__(self, directory: RunDirectory, spec: RunSpec, placement: Placement, *, logbook: MetricsLogger) -> None:
        bound = qk_clip_bound(spec.optimizer)
        if bound is not None and placement.compile:
            raise UserError(
                f"placement: compile = true, and the optimizer has qk_clip = {bound:g}, which looks into every training "
                "pass; compiled code cannot be looked into. Set compile = false for this run, or leave qk_clip out."
            )
        self.directory, self.spec, self.logbook = directory, spec, logbook
        self.steps = measured_steps(spec)
        self.clip = None if bound is None else QkClip(bound)
        self._before: list[Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"clipped": self.clip.clipped} if self.clip else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if self.clip:
            self.clip.clipped = state_dict["clipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the rows that an earlier attempt wrote after its last checkpoint."""
        if self.clip:
            self.clip.watch(cast("TrainingModule", pl_module).model)
        if self.steps and trainer.is_global_zero:
            kept = [row for row in self.directory.dynamics() if row.step <= trainer.global_step]
            write_lines(self.directory.dynamics_file, kept)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model without hooks, however the run ended."""
        if self.clip:
            self.clip.forget()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the weights of a step that is measured."""
        if trainer.global_step + 1 in self.steps:
            self.logbook.pause()
            self._before = weights_of(optimizer)
            self.logbook.go_on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step: the size of the update, then the clip, then what the weights are."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        module = cast("TrainingModule", pl_module)
        optimizer = cast("torch.optim.Optimizer", module.optimizers(use_pl_optimizer=False))
        before, self._before = self._before, None
        sizes = None
        if before is not None:
            self.logbook.pause()
            sizes = update_rms(optimizer, before)
            self.logbook.go_on()
        if self.clip:
            self.clip.after_step(module.maximum_over_processes)
        if sizes is not None:
            self.logbook.pause()
            self._write(trainer, module, optimizer, sizes)
            self.logbook.go_on()

    def _write(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer, sizes: dict[str, float]
    ) -> None:
        step = trainer.global_step
        row = DynamicsRow(
            step=step,
            tokens=step * self.spec.batch_tokens,
            update_rms=_finite(sizes),
            largest_logit=_finite(largest_attention_logits(module, self.logbook.held_out[: module.evaluation_windows])),
            svd_entropy=svd_entropy(optimizer),
            clipped_heads=self.clip.clipped if self.clip else None,
        )
        if trainer.is_global_zero:
            append_line(self.directory.dynamics_file, row)


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Without the values of a run that is diverging, which JSON could not say."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
