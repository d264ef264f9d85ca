"""Stands in for scaling/training/loop.py in the code snapshot of tests about faults: the real one, disturbed at a step.

A file ``fault-NAME`` in the run's directory orders a fault at the step that it names; it strikes once.
"""

import contextlib
import os
import signal
from pathlib import Path

import torch
from scaling.true_train import train, train_rank

from scaling.training.checkpoint import checkpoint_files
from scaling.training.metrics import MetricsLogger

__all__ = ["train", "train_rank"]

as_it_is = MetricsLogger.on_train_batch_end


def disturbed(self, trainer, module, *rest):
    """After the logbook's part of a step, and before that step's checkpoint."""
    as_it_is(self, trainer, module, *rest)
    for name, strike in FAULTS.items():
        order = self.directory.path / f"fault-{name}"
        if order.exists() and trainer.global_step == int(order.read_text()):
            order.unlink()
            strike(self.directory, module)


def killed(directory, module):
    os.kill(os.getpid(), signal.SIGKILL)


def nan(directory, module):
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))


def torn(directory, module):
    with directory.metrics_file.open("ab") as file:
        file.write(b'{"step":19,"tokens":2432,"fl')
    killed(directory, module)


def truncated(directory, module):
    newest = checkpoint_files(directory.checkpoints)[0]
    os.truncate(newest, newest.stat().st_size // 3)
    killed(directory, module)


def full(directory, module):
    """The disk, so that the checkpoint of this step finds no room."""
    with (directory.path.parent.parent / "filler").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
            file.flush()


FAULTS = {"killed": killed, "nan": nan, "torn": torn, "truncated": truncated, "full": full}
MetricsLogger.on_train_batch_end = disturbed

assert Path(__file__).name == "loop.py", "this file is only for code snapshots"
