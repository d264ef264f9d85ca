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
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from scaling.training.launch import begin
from scaling.training.shutdown import ShutdownRequest

LOG = "log.txt"
"""What a run prints, in its directory."""

POLL_SECONDS = 0.2
RETELL_SECONDS = 2.0


def train_packed(runs: Iterable[Path | str], *, at_once: int) -> dict[str, str]:
    """Train runs side by side, at most `at_once` of them, the first named first.

    A stop signal is passed on; each run then saves at its next step boundary, and those that have not begun are left.

    Returns:
        The reason of every run that failed, by the name of its directory.
    """
    failed: dict[str, str] = {}

    def ended(directory: RunDirectory, exit_code: int) -> None:
        if (reason := _why_ended(directory, exit_code)) is not None:
            failed[directory.path.name] = reason

    side_by_side(runs, at_once=at_once, work=train_in_process, ended=ended)
    return failed


def side_by_side(
    runs: Iterable[Path | str],
    *,
    at_once: int,
    work: Callable[[str], None],
    ended: Callable[[RunDirectory, int], None],
    leave: Callable[[RunDirectory], bool] = lambda directory: False,
) -> None:
    """Give each run a process of its own, at most `at_once` of them, until all have ended.

    Args:
        runs: Run directories, the first to begin first.
        at_once: Processes at the same time.
        work: A process's whole life, given the path; importable by name, for it is called elsewhere.
        ended: Told of each run and its exit status as `subprocess` counts, once its process is gone.
        leave: Whether one run alone shall stop; asked again and again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scaling.training.loop"])
    _start_deaf_server()
    waiting = [RunDirectory(run) for run in runs]
    active: list[tuple[RunDirectory, ForkServerProcess]] = []
    stop, told = ShutdownRequest(), dict[str, float]()
    with stop.listening():
        while waiting or active:
            while waiting and len(active) < at_once and not stop.due():
                directory = waiting.pop(0)
                process = context.Process(target=work, args=(str(directory.path),))
                begin(process)
                active.append((directory, process))
            connection.wait([process.sentinel for _, process in active], timeout=POLL_SECONDS)
            if stop.due():
                waiting = []
            for directory, process in list(active):
                if not process.is_alive():
                    active.remove((directory, process))
                    ended(directory, process.exitcode or 0)
                elif (stop.due() or leave(directory)) and time.monotonic() > told.get(directory.path.name, 0.0):
                    # Told again, for a process that has only begun is as deaf as the server that it comes from.
                    told[directory.path.name] = time.monotonic() + RETELL_SECONDS
                    process.terminate()


def _start_deaf_server() -> None:
    """The server that forks workers, deaf to signals that the scheduler sends to every process of a job.

    Its death would look like that of the workers, which live on.
    """
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        forkserver.ensure_running()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _why_ended(directory: RunDirectory, exit_code: int) -> str | None:
    """Why a run whose process is gone failed; None if it did not."""
    if exit_code < 0:
        return note_kill(directory, exit_code)
    if not exit_code:
        return None
    said = directory.failure() if directory.state() == "failed" else None
    return said or f"it ended with code {exit_code}; see {LOG} in its directory"


def note_kill(directory: RunDirectory, exit_code: int) -> str:
    """Write down, in the place of a run that no longer can, that a signal killed its process; the reason."""
    reason = f"its process was killed by {signal.Signals(-exit_code).name}"
    with contextlib.suppress(OSError, UserError):  # of a full disk or a damaged file; the caller reports the kill
        row = directory.last_row()
        directory.note("end", step=row.step if row else 0, outcome="failed", reason=reason)
    return reason


def own_log(path: Path | str) -> None:
    """Send what this process prints to the run's own log from here on."""
    log = os.open(Path(path) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def train_in_process(path: str, gpu: str | None = None) -> None:
    """The life of a process that trains one run: its own session, so that Ctrl-C reaches the parent alone, and its own log.

    Args:
        path: The run's directory.
        gpu: What it gets as ``CUDA_VISIBLE_DEVICES``, if it is given one.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, which the server that forks us has not done
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)  # until it trains there is nothing to save
    with contextlib.suppress(OSError):
        os.setsid()
    own_log(path)
    try:
        from scaling.training.loop import train

        train(Path(path), progress=False)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
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


LOG_LINES = 5


def log_tail(directory: RunDirectory) -> str:
    """The end of what the run printed, as one clause."""
    log: Path = directory.path / LOG
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log"
    return f"its log ends: {' / '.join(lines[-LOG_LINES:])}"[:1000] if lines else "its log is empty"
