"""Processes that train: a pool forked from one server, and the life of a process that trains one run.

`ProcessPool` serves everything that trains in other processes: the local executor, several runs packed into one job
(`side_by_side`), and the ranks of one run (`scaling.training.launch`). Importing torch and Lightning takes ten seconds
and more; the server imports them once, and forking a worker from it takes none of that time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from scaling.errors import UserError
from scaling.run.directory import LOG as LOG
from scaling.run.directory import RunDirectory
from scaling.training.shutdown import ShutdownRequest, handling

POLL_SECONDS = 0.2
TERMINATE_AGAIN_SECONDS = 2.0
LOG_LINES = 5
MAX_LOG_CHARACTERS = 1000
JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Signals that a scheduler sends to every process of a job."""


class ProcessExit(NamedTuple):
    """A worker that has ended."""

    name: str
    code: int
    """Exit status as `subprocess` counts it: negative for the signal that killed the process."""


class ProcessPool:
    """Workers by name, forked from a server that has imported the training code; a context manager.

    ::

        with ProcessPool(threads=1) as pool:
            pool.start("a1b2", train_in_process, "runs/a1b2", None)
            while pool.active:
                for worker in pool.wait():
                    print(worker.name, worker.code)

    Leaving the context kills the workers that still run. To let them save first, call `stop`.

    Args:
        threads: Value of OMP_NUM_THREADS and MKL_NUM_THREADS for the workers; None leaves the environment as it is.
            OpenMP reads it when the server imports torch, so it has no effect on a server that already runs.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = threads
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._workers: dict[str, ForkServerProcess] = {}
        self._terminated_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._context.set_forkserver_preload(["scaling.training.loop"])
        with _environment(self._threads), handling(JOB_SIGNALS, signal.SIG_IGN):
            # Workers outlive a server that a signal kills, but look dead from then on. So the server ignores signals.
            forkserver.ensure_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            if worker.is_alive():
                worker.kill()
            worker.join()
        self._workers.clear()

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the workers whose end `wait` has not returned yet, in the order of their start."""
        return tuple(self._workers)

    def start(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        """Fork a worker that calls a function with default signal handlers, and exits when the function returns.

        Args:
            name: Unique among the active workers.
            function: Importable by its name, because it is looked up in the new process.
            arguments: Picklable.

        Raises:
            UserError: The server ended before it could fork.
        """
        worker = self._context.Process(target=_call, args=(function, arguments))
        try:
            worker.start()
        except (EOFError, ConnectionError) as error:
            raise UserError(
                "the server process that forks training processes was killed before it started one "
                f"({type(error).__name__}), perhaps because the machine is out of memory. "
                "Free some memory or train fewer runs at once, and run the same command again; it continues from here."
            ) from None
        self._workers[name] = worker

    def wait(self, timeout: float = POLL_SECONDS) -> list[ProcessExit]:
        """Workers that have ended since the last call; returns after `timeout` seconds at the latest."""
        if self._workers:
            connection.wait([worker.sentinel for worker in self._workers.values()], timeout=timeout)
        else:
            time.sleep(timeout)
        ended = [
            ProcessExit(name, worker.exitcode or 0) for name, worker in self._workers.items() if not worker.is_alive()
        ]
        for name, _ in ended:
            del self._workers[name]
            self._terminated_at.pop(name, None)
        return ended

    def terminate(self, names: Iterable[str] | None = None) -> None:
        """Send SIGTERM, upon which a run saves a checkpoint at its next step boundary and ends; None means all workers.

        Call it in every round of a loop: a worker still ignores signals immediately after its fork, so the signal is
        sent again every `TERMINATE_AGAIN_SECONDS`.
        """
        now = time.monotonic()
        for name in self.active if names is None else names:
            if now >= self._terminated_at.get(name, 0.0):
                self._terminated_at[name] = now + TERMINATE_AGAIN_SECONDS
                self._workers[name].terminate()

    def stop(self, grace_seconds: float) -> list[ProcessExit]:
        """Terminate all workers, and kill those that have not ended after `grace_seconds`; how each of them ended."""
        ended: list[ProcessExit] = []
        deadline = time.monotonic() + grace_seconds
        try:
            while self._workers and time.monotonic() < deadline:
                self.terminate()
                ended += self.wait()
        finally:  # a second Ctrl-C ends the grace period
            for worker in self._workers.values():
                worker.kill()
                worker.join()
        return ended + (self.wait() if self._workers else [])


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for signum in JOB_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)  # there is nothing to save until training starts and takes them over
    function(*arguments)


@contextlib.contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    names = () if threads is None else ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def side_by_side(
    runs: Iterable[Path | str],
    *,
    at_once: int,
    work: Callable[[str], None],
    ended: Callable[[RunDirectory, int], None],
    leave: Callable[[RunDirectory], bool] = lambda directory: False,
) -> None:
    """Run each run in a process of its own, at most `at_once` at a time, until all have ended.

    A small model does not fill a GPU: its steps are bound by kernel launches, and runs side by side fill each other's
    gaps. A stop signal is passed on to the active runs, and the waiting ones are not started.

    Args:
        runs: Run directories, in the order of their start.
        at_once: Processes at the same time.
        work: Body of a process, called with the path; importable by its name.
        ended: Called with each run and its exit status (`ProcessExit.code`) after its process has ended.
        leave: Whether a single active run should stop; called repeatedly.
    """
    waiting = [str(Path(run)) for run in runs]
    stop = ShutdownRequest()
    with ProcessPool() as pool, stop.listening():
        while waiting or pool.active:
            if stop.due():
                waiting.clear()
            while waiting and len(pool.active) < at_once:
                path = waiting.pop(0)
                pool.start(path, work, path)
            if pool.active:
                for path, code in pool.wait():
                    ended(RunDirectory(path), code)
            pool.terminate([path for path in pool.active if stop.due() or leave(RunDirectory(path))])


def note_kill(directory: RunDirectory, exit_code: int) -> str:
    """Record in a run's directory that a signal killed its process, which could not do so itself; returns the reason."""
    reason = f"its process was killed by {signal.Signals(-exit_code).name}"
    with contextlib.suppress(OSError, UserError):  # of a full disk or a damaged file; the caller reports the kill
        row = directory.last_row()
        directory.note("end", step=row.step if row else 0, outcome="failed", reason=reason)
    return reason


def own_log(path: Path | str) -> None:
    """Redirect the output of this process to the log in a run's directory."""
    log = os.open(Path(path) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def log_tail(directory: RunDirectory) -> str:
    """The end of a run's log as one clause of a sentence."""
    try:
        text = (directory.path / LOG).read_text(errors="replace")
    except OSError:
        return "it left no log"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"its log ends: {' / '.join(lines[-LOG_LINES:])}"[:MAX_LOG_CHARACTERS] if lines else "its log is empty"


def train_in_process(path: str, gpu: str | None = None) -> None:
    """Body of a process that trains one run, in a session of its own (Ctrl-C reaches only the parent) and with its own log.

    Args:
        path: Run directory.
        gpu: Value of ``CUDA_VISIBLE_DEVICES``; None leaves it as it is.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, which the server has not done
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
    """Values of ``CUDA_VISIBLE_DEVICES`` for runs that train at the same time; empty on a machine without GPUs.

    Every device appears once before any appears twice.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # queries the driver's library and creates no context
    devices = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    return devices * runs_per_gpu
