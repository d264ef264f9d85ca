"""Checkpoints: when a run saves its state, how the file is written, and which file it continues from.

Three habits of Lightning are not used, each for a measured reason. Its checkpoint is written to the node's temporary
folder and moved, which truncates the old one in place on another file system; its signal handlers save in the middle of a
step; its loader continues at the wrong batch. Here a signal only sets a flag, the state is saved at the border of an
optimizer step, and a file gets its name, which carries its own checksum, by a rename in its own folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from scaling.io import temporary_name
from scaling.training.shutdown import ShutdownRequest as ShutdownRequest

KEPT = 2
"""Checkpoints that stay on disk: the newest, and the one before it in case the newest cannot be read."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint as one file under a temporary name, flushed, then renamed to carry its SHA-256.

    A checkpoint at `folder/step-00000120` is stored as ``step-00000120.<16 hex digits>.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`, then forget all but the newest `KEPT`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            with temporary.open("w+b") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                digest = _digest(temporary)
            temporary.replace(path.with_name(f"{path.name}.{digest}.ckpt"))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for old in checkpoint_files(path.parent)[KEPT:]:
            self.remove_checkpoint(old)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The state in a file; never more than tensors and plain values, whatever the caller asks for."""
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file; one that is gone already is fine."""
        Path(path).unlink(missing_ok=True)


def _digest(path: Path) -> str:
    """Of a file in ``<run>/checkpoint/``, the run's name included: another run's checkpoint is as good as damaged."""
    run = path.absolute().parent.parent.name.encode()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(run)).hexdigest()[:16]


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoint files of a run, newest first, unchecked."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    return int(path.name.split(".")[0].rpartition("-")[2])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest file whose content still has the checksum in its name; damaged ones are passed over, which is said."""
    for path in checkpoint_files(folder):
        if _whole(path):
            return path
        print(f"{path.name}: damaged, or another run's; continuing from the one before it", file=sys.stderr, flush=True)
    return None


def branch_checkpoint(folder: Path, step: int) -> Path | None:
    """The point that a trunk kept for branches after `step`, whole; None if there is none."""
    return next(filter(_whole, sorted(folder.glob(f"branch-{step:08d}.*.ckpt"))), None)


def _whole(path: Path) -> bool:
    return path.suffixes[-2:-1] == [f".{_digest(path)}"]


class Checkpoints(Callback):
    """Saves at a step boundary every `seconds`, and whenever a stop is asked for, which then ends the run.

    All processes of a run take the same decision, so that a collective save cannot hang. At the steps of `keep` it
    saves a point under another name, which nothing deletes, for the runs that branch off there.
    """

    def __init__(self, folder: Path, *, seconds: float, stop: ShutdownRequest, keep: Iterable[int] = ()) -> None:
        self.folder = folder
        self.seconds = seconds
        self.stop = stop
        self.keep = set(keep)
        self.preempted = False
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._listening = contextlib.ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, which registered its own handlers a moment ago."""
        self._listening.enter_context(self.stop.listening())
        self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._listening.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._listening.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time or a stop was asked for."""
        if trainer.global_step == self._saved_step or trainer.global_step >= trainer.max_steps or trainer.should_stop:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step in self.keep:
            trainer.save_checkpoint(self.folder / f"branch-{trainer.global_step:08d}")
        decide = trainer.strategy.reduce_boolean_decision
        stopping = decide(self.stop.due(), all=False)
        if stopping or decide(time.monotonic() - self._saved_at >= self.seconds, all=False):
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}")
            self._saved_at = time.monotonic()
            self._saved_step = trainer.global_step
        if stopping:
            self.preempted = True
            trainer.should_stop = True
