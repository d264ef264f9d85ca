"""Checkpoints: when a run saves its state, how the file is written, and which file it continues from.

Three mechanisms of Lightning are replaced, each for a measured reason. It writes a checkpoint to the node's temporary
folder and moves it, which on another file system truncates the old one in place; its signal handlers save in the middle
of a step; its loader continues at the wrong batch. Here a signal only sets a flag, the state is saved at a step boundary,
and a file is renamed within its folder to a name that contains its checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from scaling.io import temporary_name
from scaling.training.shutdown import ShutdownRequest

MAX_CHECKPOINTS = 2
"""Checkpoints that stay on disk: the newest, and the previous one in case the newest is damaged."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint as one file under a temporary name, flushed, then renamed to carry its SHA-256.

    A checkpoint at `folder/step-00000120` is stored as ``step-00000120.<16 hex digits>.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`, then delete all but the newest `MAX_CHECKPOINTS`."""
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
        for old in checkpoint_files(path.parent)[MAX_CHECKPOINTS:]:
            self.remove_checkpoint(old)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The state in a file, restricted to tensors and plain values; `weights_only` is always true."""
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file if it exists."""
        Path(path).unlink(missing_ok=True)


def _digest(path: Path) -> str:
    """Checksum of a file in ``<run>/checkpoint/`` with the run's id, so that another run's checkpoint does not match."""
    run = path.absolute().parent.parent.name.encode()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(run)).hexdigest()[:16]


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first, unchecked."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(path.name.split(".")[0].rpartition("-")[2])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose content matches its checksum; damaged ones are reported on stderr."""
    for path in checkpoint_files(folder):
        if _is_intact(path):
            return path
        print(f"{path.name}: damaged, or another run's; using the previous checkpoint", file=sys.stderr, flush=True)
    return None


def branch_checkpoint(folder: Path, step: int) -> Path | None:
    """The checkpoint that a trunk kept after `step` for branches; None if there is no intact one."""
    return next(filter(_is_intact, sorted(folder.glob(f"branch-{step:08d}.*.ckpt"))), None)


def _is_intact(path: Path) -> bool:
    return path.suffixes[-2:-1] == [f".{_digest(path)}"]


class Checkpoints(Callback):
    """Callback that saves at a step boundary every `seconds`, and before a requested shutdown, which it carries out.

    All processes of a run take the same decision, because saving is a collective operation.

    Args:
        folder: Where to save.
        seconds: Time between checkpoints.
        stop: The shutdown request.
        keep: Steps at which a checkpoint is saved permanently, for runs that branch off there.
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
        """Replace the signal handlers that Lightning has registered, and adopt a signal that they have received."""
        self._listening.enter_context(self.stop.listening())
        connector = trainer._signal_connector
        if connector.received_sigterm:  # it would raise SIGTERMException, and the run would count as failed
            connector.received_sigterm = False
            self.stop.reason = signal.SIGTERM.name
        self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers."""
        self._listening.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._listening.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, or if a shutdown was requested."""
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
