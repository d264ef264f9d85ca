"""Metrics of a run: metrics.jsonl, the held-out loss, divergence, and the time that training and optimizer take."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from scaling.flops import train_flops, train_flops_per_token
from scaling.io import append_line, write_lines
from scaling.run.directory import RunDirectory
from scaling.run.record import Device, MetricsRow
from scaling.spec import RunSpec

if TYPE_CHECKING:
    from scaling.training.module import TrainingModule


MAX_ROWS = 200
"""Evenly spaced rows of metrics per run; evaluated steps add theirs."""


def spread(count: int, steps: int) -> set[int]:
    """At most `count` of the steps 1 to `steps`, evenly spaced, with the last."""
    count = min(count, steps)
    return {max(1, round(steps * part / count)) for part in range(1, count + 1)}


@torch.no_grad()
def held_out_loss(module: TrainingModule, sequences: Tensor, *, micro_batch: int) -> float:
    """Mean next-token loss over all sequences, nats per token.

    Args:
        module: The model with its precision.
        sequences: Shape ``(sequences, context + 1)``, int64, in host memory.
        micro_batch: Sequences per forward pass; the mean depends on it only by rounding.
    """
    total = torch.zeros((), dtype=torch.float64, device=module.device)
    with module.trainer.precision_plugin.forward_context():
        for part in torch.split(sequences, micro_batch):
            total += module.model.loss(part.to(module.device)).double() * len(part)
    return float(total) / len(sequences)


class Stopwatch:
    """Seconds of training over all attempts, paused while the run evaluates or saves.

    Args:
        clock: `time.perf_counter`, or `time.process_time` for CPU time.
        counted: Seconds of earlier attempts.
    """

    def __init__(self, clock: Callable[[], float], counted: float = 0.0) -> None:
        self._clock, self._counted = clock, counted
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._counted + (self._clock() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        """Start or continue."""
        self._since = self._clock()

    def stop(self) -> None:
        """Pause."""
        self._counted, self._since = self.seconds, None


class MetricsLogger(Callback):
    """Callback that writes rows of metrics and ends the run when its loss is not finite.

    Its running sums are part of the checkpoint, so a resumed run writes the same rows as an uninterrupted one.

    Args:
        directory: Where the rows are written.
        spec: The run.
        device: For its peak, which model FLOPs utilisation refers to.
        held_out: Sequences of the evaluation, shape ``(sequences, context + 1)``.
        charged: FLOPs of the run whose weights this one starts from, which count in the rows.
    """

    def __init__(
        self, directory: RunDirectory, spec: RunSpec, *, device: Device, held_out: np.ndarray, charged: int = 0
    ) -> None:
        self.directory = directory
        self.charged = charged
        self.spec = spec
        self.device = device
        self.held_out = torch.from_numpy(held_out)
        self.every = max(1, spec.steps // MAX_ROWS)
        self.evaluate_at = spread(spec.evaluation.times + 1, spec.steps)
        self.tail_starts = spec.steps - max(1, spec.steps // 10)
        self.wall_time, self.cpu_time = Stopwatch(time.perf_counter), Stopwatch(time.process_time)
        self.diverged: str | None = None
        self.validation_loss: float | None = None
        # Sums stay on the device, so that the host waits for a GPU once per row and not once per step.
        self.row_sum, self.row_count = torch.zeros((), dtype=torch.float64), 0
        self.tail_sum, self.tail_count = torch.zeros((), dtype=torch.float64), 0
        self.row_step, self.row_seconds = 0, 0.0

    @property
    def train_loss(self) -> float | None:
        """Mean over the last tenth of the steps, nats per token; None before them."""
        return float(self.tail_sum) / self.tail_count if self.tail_count else None

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "row": (float(self.row_sum), self.row_count),
            "tail": (float(self.tail_sum), self.tail_count),
            "row_step": self.row_step,
            "row_seconds": self.row_seconds,
            "seconds": self.wall_time.seconds,
            "cpu_seconds": self.cpu_time.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        (row, self.row_count), (tail, self.tail_count) = state_dict["row"], state_dict["tail"]
        self.row_sum = torch.tensor(row, dtype=torch.float64)
        self.tail_sum = torch.tensor(tail, dtype=torch.float64)
        self.row_step, self.row_seconds = state_dict["row_step"], state_dict["row_seconds"]
        self.wall_time = Stopwatch(time.perf_counter, state_dict["seconds"])
        self.cpu_time = Stopwatch(time.process_time, state_dict["cpu_seconds"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows that an earlier attempt wrote after its last checkpoint."""
        self.row_sum, self.tail_sum = self.row_sum.to(pl_module.device), self.tail_sum.to(pl_module.device)
        if trainer.global_step <= self.tail_starts:  # a branch does not count the last tenth of its trunk
            self.tail_sum, self.tail_count = torch.zeros_like(self.tail_sum), 0
        if trainer.is_global_zero:
            kept = [row for row in self.directory.metrics() if row.step <= trainer.global_step]
            write_lines(self.directory.metrics_file, kept)
        self.wall_time.start()
        self.cpu_time.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of the micro-batch; at the end of an optimizer step, write a row if one is due."""
        module = cast("TrainingModule", pl_module)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        step = trainer.global_step if stepped else trainer.global_step + 1
        loss = module.last_loss.double()
        self.row_sum += loss
        self.row_count += 1
        if step > self.tail_starts:
            self.tail_sum += loss
            self.tail_count += 1
        evaluate = step in self.evaluate_at
        if stepped and (evaluate or step % self.every == 0):
            with self.paused():
                self._row(step, module, evaluate=evaluate)
            trainer.should_stop |= self.diverged is not None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context for work that is not training, whose time does not count."""
        self.wall_time.stop()
        self.cpu_time.stop()
        yield
        self.wall_time.start()
        self.cpu_time.start()

    def _row(self, step: int, module: TrainingModule, *, evaluate: bool) -> None:
        shape, tokens = self.spec.model, step * self.spec.batch_tokens
        loss = module.mean_over_processes(self.row_sum / self.row_count)
        finite = math.isfinite(loss)
        validation = None
        if evaluate and finite:
            validation = held_out_loss(module, self.held_out, micro_batch=module.evaluation_sequences)
            finite = math.isfinite(validation)
        if not finite:
            self.diverged = (
                f"the loss was not finite between steps {self.row_step + 1:,} and {step:,} of {self.spec.steps:,} "
                f"at a peak learning rate of {self.spec.optimizer.peak_lr:g}"
            )
        elif step == self.spec.steps:
            self.validation_loss = validation
            self.tail_sum = torch.tensor(module.mean_over_processes(self.tail_sum), dtype=torch.float64)
        rate = (step - self.row_step) * self.spec.batch_tokens / max(self.wall_time.seconds - self.row_seconds, 1e-9)
        peak = self.device.peak_flops
        norm = float(module.grad_norm)
        row = MetricsRow(
            step=step,
            tokens=tokens,
            flops=train_flops(shape, tokens) + self.charged,
            train_loss=loss if math.isfinite(loss) else None,
            learning_rate=module.learning_rate,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens_per_second=rate,
            mfu=rate * train_flops_per_token(shape, "attention") / (peak * self.device.count) if peak else None,
            validation_loss=validation if finite else None,
            load_imbalance=module.model.load_imbalance(),
        )
        if module.trainer.is_global_zero:
            append_line(self.directory.metrics_file, row)
        self.row_sum, self.row_count = torch.zeros_like(self.row_sum), 0
        self.row_step, self.row_seconds = step, self.wall_time.seconds


GPU_TIMING_INTERVAL = 16
"""Steps per timed step on a GPU; each one takes two events, which are read at the end of the run."""


class OptimizerStepTimer:
    """Mean duration of optimizer steps: of all steps on a CPU; on a GPU of some, by events, so that the host never waits."""

    def __init__(self) -> None:
        self._seconds, self._steps, self._started = 0.0, 0, 0
        self._since: float | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._open: torch.cuda.Event | None = None

    @property
    def mean(self) -> float | None:
        """Seconds, mean over the timed steps; None before the first. Waits for the GPU."""
        seconds, steps = self._seconds, self._steps
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
            steps += 1
        return seconds / steps if steps else None

    def start(self, device: torch.device) -> None:
        """Call it when the gradients are complete."""
        self._started += 1
        if device.type == "cuda":
            if self._started % GPU_TIMING_INTERVAL == 0:
                self._open = _recorded_event()
        else:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Call it after the weights were changed, and after a micro-batch without a step."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._steps += 1
            self._since = None
        if self._open is not None:
            self._events.append((self._open, _recorded_event()))
            self._open = None


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
