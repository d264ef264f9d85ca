"""Several small runs on one device at the same time, each an ordinary run in a process of its own.

A small model does not fill a GPU, and a step of it is bound by launches; runs side by side fill the gaps of each
other. One that fails or is killed is noted as failed in its own directory and takes none of its neighbours down.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from scaling.errors import Refusal
from scaling.records import RunDirectory
from scaling.resume import StopRequest

LOG = "log.txt"
"""What a run prints, in its directory."""

POLL_SECONDS = 0.2


def train_packed(runs: Iterable[Path | str], *, at_once: int) -> dict[str, str]:
    """Train runs side by side, at most `at_once` of them, the first named first.

    A stop signal is passed on; each run then saves at its next step border, and those that have not begun are left.

    Returns:
        The reason of every run that failed, by the name of its directory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scaling.train"])
    waiting = [RunDirectory(run) for run in runs]
    active: list[tuple[RunDirectory, ForkServerProcess]] = []
    failed: dict[str, str] = {}
    stop, told = StopRequest(), False
    with stop.listening():
        while waiting or active:
            while waiting and len(active) < at_once and not told:
                directory = waiting.pop(0)
                process = context.Process(target=_train, args=(str(directory.path),))
                process.start()
                active.append((directory, process))
            connection.wait([process.sentinel for _, process in active], timeout=POLL_SECONDS)
            if stop.due() and not told:
                told, waiting = True, []
                for _, process in active:
                    process.terminate()
            for directory, process in list(active):
                if not process.is_alive():
                    active.remove((directory, process))
                    if (reason := _ended(directory, process.exitcode or 0)) is not None:
                        failed[directory.path.name] = reason
    return failed


def _ended(directory: RunDirectory, exit_code: int) -> str | None:
    """Why a run whose process is gone failed; None if it did not."""
    if exit_code < 0:
        reason = f"its process was killed by {signal.Signals(-exit_code).name}"
        rows = directory.metrics()
        directory.note("end", step=rows[-1].step if rows else 0, outcome="failed", reason=reason)
        return reason
    attempts = directory.attempts()
    if exit_code and attempts and attempts[-1].outcome == "failed":
        return attempts[-1].reason
    return f"it ended with code {exit_code}; see {LOG} in its directory" if exit_code else None


def _train(path: str) -> None:
    log = os.open(Path(path) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with contextlib.suppress(OSError):
        os.setsid()  # so that Ctrl-C reaches the parent alone, which passes it on
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        from scaling.train import train

        train(Path(path), progress=False)
    except Refusal as refusal:
        print(refusal, file=sys.stderr, flush=True)
        sys.exit(2)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def device_slots(runs_per_gpu: int) -> list[str]:
    """What each run that may train at the same time gets as ``CUDA_VISIBLE_DEVICES``; empty where there is no GPU.

    The first so many runs go to different devices, the next ones beside them.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # asks the driver's library and starts no context
    devices = named.split(",")[:count] if named else [str(index) for index in range(count)]
    return devices * runs_per_gpu
