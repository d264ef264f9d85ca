"""Runs on the CPU for tests: directories, training, numbers to compare, and actions at a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from scaling.run.directory import RunDirectory
from scaling.run.record import RunRecord
from scaling.spec import Placement, RunSpec
from scaling.training.loop import train
from scaling.training.metrics import MetricsLogger


def place(spec: RunSpec, folder: Path, shards: Path, *, every: float = 0.0, micro_batch: int | None = None) -> Path:
    """A run directory on the CPU; by default it saves a checkpoint at every step."""
    directory = RunDirectory(folder / spec.id)
    directory.create(spec, Placement(data=str(shards), device="cpu", checkpoint_seconds=every, micro_batch=micro_batch))
    return directory.path


def numbers(path: Path) -> tuple[object, ...]:
    """Everything that must be equal, not close: weights, losses, and metrics without durations."""
    directory = RunDirectory(path)
    record = directory.record()
    assert record is not None
    rows = [
        (row.step, row.train_loss, row.validation_loss, row.grad_norm, row.learning_rate) for row in directory.metrics()
    ]
    weights = {name: value.numpy().tobytes() for name, value in load_file(directory.weights_file).items()}
    return record.validation_loss, record.train_loss, rows, weights


def finish(path: Path) -> RunRecord:
    record = train(path, progress=False)
    assert record is not None
    return record


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: object) -> None:
    """Call `act` once, among the callbacks after optimizer step `step`."""
    original, done = MetricsLogger.on_train_batch_end, []

    def hooked(self: MetricsLogger, trainer: object, *rest: object) -> None:
        original(self, trainer, *rest)  # type: ignore[arg-type]
        if trainer.global_step == step and not done:  # type: ignore[attr-defined]
            done.append(True)
            act()  # type: ignore[operator]

    monkeypatch.setattr(MetricsLogger, "on_train_batch_end", hooked)
