"""The local executor: trains the missing runs of a plan on this machine, several at once.

Each run has a process of its own, so a run that is killed or runs out of memory does not affect the others. A fork
server imports the training code once, which takes ten seconds and more, and each run is a fork of it. A run trains only
while its process holds the run's own lock, so two submitters at once train each run once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from types import FrameType, TracebackType
from typing import Literal, Self

import msgspec

from scaling.errors import UserError, os_error_sentence
from scaling.run.directory import LOG, RunDirectory
from scaling.run.progress import ProgressReporter
from scaling.training.pool import begin, device_slots, log_tail, note_kill, train_in_process
from sweeps.planning.plan import CampaignPlan, PlannedRun, with_data
from sweeps.planning.retry import Retry, forget_divergence, placement_changed, retries
from sweeps.planning.run_state import run_status

MAX_STARTS = 3
"""Starts of a run in one call before a run that is killed from outside counts as failed."""

GRACE_SECONDS = 60.0
"""Time between the request to stop and the kill; a checkpoint is saved at the next step boundary."""

POLL_SECONDS = 0.5

REFRESH_SECONDS = 2.0
"""Time between two readings of the metrics of the runs that train."""


class LocalOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of one call, by run id."""

    plan: CampaignPlan
    """The plan with final ids: its data are prepared."""
    trained: tuple[str, ...]
    """Runs that finished or diverged in this call."""
    present: tuple[str, ...]
    """Runs that were done before."""
    failed: dict[str, str]
    """Runs that failed now or earlier, with the reason."""
    stopped: tuple[str, ...]
    """Interrupted runs; the next call continues them."""

    @property
    def complete(self) -> bool:
        """True if every run of the plan is done."""
        return not self.failed and not self.stopped


class _Stop(BaseException):
    """Ctrl-C or SIGTERM."""


def run_local(
    plan: CampaignPlan,
    *,
    workers: int | None = None,
    retry: Retry = "none",
    order: Literal["cheap", "expensive"] = "cheap",
    progress: bool | None = None,
) -> LocalOutcome:
    """Train the missing runs of a plan, except those that failed under their present placement.

    Args:
        plan: The plan; its data are prepared first if necessary.
        workers: Runs at the same time; by default as many as the processors allow at each run's threads. Runs on GPUs
            are at most ``runs_per_gpu`` on each of them.
        retry: Which failed or diverged runs are tried again.
        order: Whether the cheapest runs go first.
        progress: A bar (True), nothing (False), or what the output is fit for (None).

    Raises:
        UserError: The data cannot be prepared, or there are no workers.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, so no run would ever start. Use 1 or more.")
    plan = with_data(plan, progress=progress)
    plan.write()
    runs = sorted(plan.distinct(), key=lambda run: run.spec.budget.flops, reverse=order == "expensive")
    executor = _LocalExecutor(plan, runs, retry)
    if executor.waiting:
        threads = max(placement.threads for placement in plan.placements.values())
        workers = workers or max(1, (os.cpu_count() or 1) // threads)
        executor.slots = _slots(plan)
        workers = min(workers, len(executor.slots) or workers)
        with CampaignProgress(plan, progress) as shown, _threads(threads), _stop_signals():
            executor.work(workers, shown)
    return executor.outcome()


class CampaignProgress:
    """Context manager that shows the progress of the runs that train, and of all runs together by their FLOPs."""

    def __init__(self, plan: CampaignPlan, progress: bool | None) -> None:
        self.plan = plan
        self.flops = {run.id: run.spec.budget.flops for run in plan.distinct()}
        self.reporter = ProgressReporter(plan.campaign.name, total=1.0, bar=progress)
        self._active: dict[str, PlannedRun] = {}
        self._refresh_at = 0.0

    def __enter__(self) -> Self:
        self.reporter.__enter__()
        self.reporter.update(0.0, state="loading the training code")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.__exit__(kind, error, trace)

    def update(self, active: Sequence[PlannedRun], *, waiting: Sequence[PlannedRun]) -> None:
        """Show shares and losses; called often, it reads the metrics every `REFRESH_SECONDS`."""
        now_active = {run.id: run for run in active}
        for run in [run for run in self._active.values() if run.id not in now_active]:
            last = run_status(self.plan, run)
            loss = "" if last.loss is None else f", loss {last.loss:.3f}"
            self.reporter.remove_part(f"{run.arm} {run.cell}")
            self.say(f"{run.arm} {run.cell} {last.state} at {last.share:.0%}{loss}")
        self._active = now_active
        if time.monotonic() < self._refresh_at:
            return
        self._refresh_at = time.monotonic() + REFRESH_SECONDS
        left = {run.id: 1.0 for run in waiting}
        for run in active:
            now = run_status(self.plan, run)
            left[run.id] = 1.0 - now.share
            self.reporter.update_part(
                f"{run.arm} {run.cell}", now.share, **({} if now.loss is None else {"loss": f"{now.loss:.3f}"})
            )
        done = sum(flops * (1.0 - left.get(run, 0.0)) for run, flops in self.flops.items())
        state = {"state": "waiting for another submitter"} if waiting and not active else {}
        ended = f"{len(self.flops) - len(left)} of {len(self.flops)} ended"
        self.reporter.update(done / max(sum(self.flops.values()), 1), runs=ended, **state)

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.reporter.print(sentence)


class _LocalExecutor:
    """Runs of a plan that wait, those that train, and the outcome of the others."""

    def __init__(self, plan: CampaignPlan, runs: list[PlannedRun], retry: Retry) -> None:
        self.plan = plan
        self.waiting: list[PlannedRun] = []
        self.active: dict[str, tuple[PlannedRun, ForkServerProcess]] = {}
        self.slots: list[str] = []
        self.slot_of: dict[str, str] = {}
        self.starts = Counter[str]()
        self.present: list[str] = []
        self.trained: list[str] = []
        self.stopped: list[str] = []
        self.failed: dict[str, str] = {}
        for run in runs:
            state = plan.state(run)
            if state == "diverged" and retries(retry, "diverged"):
                forget_divergence(plan.directory(run))
                state = "planned"
            if state in ("finished", "diverged"):
                self.present.append(run.id)
            elif state == "failed" and not (
                retries(retry, "failed") or placement_changed(plan.directory(run), run.placement)
            ):
                self.failed[run.id] = _reason(plan.directory(run))
            else:
                self.waiting.append(run)

    def work(self, workers: int, shown: CampaignProgress) -> None:
        """Train until nothing is left or a stop is requested."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["scaling.training.loop"])
        try:
            while self.waiting or self.active:
                while len(self.active) < workers and (run := self._next()) is not None:
                    directory = self.plan.directory(run)
                    # Not earlier: until here the directory holds the placement under which the run last failed.
                    try:
                        directory.create(run.spec, run.placement)
                    except OSError as error:
                        self.failed[run.id] = os_error_sentence(error)
                        continue
                    process = context.Process(target=train_in_process, args=(str(directory.path), self._slot(run)))
                    begin(process)
                    self.active[run.id] = run, process
                    self.starts[run.id] += 1
                if sentinels := [process.sentinel for _, process in self.active.values()]:
                    connection.wait(sentinels, timeout=POLL_SECONDS)
                else:
                    time.sleep(POLL_SECONDS)
                for run, process in list(self.active.values()):
                    if not process.is_alive():
                        del self.active[run.id]
                        self._ended(run, process.exitcode or 0)
                shown.update([run for run, _ in self.active.values()], waiting=self.waiting)
        except _Stop:
            shown.say("stopping at the next step; the same command continues from there")
        finally:
            self._stop()

    def _slot(self, run: PlannedRun) -> str | None:
        """The GPU for a run: the least used one with a free slot."""
        taken = [self.slot_of[other] for other in self.active if other in self.slot_of]
        free = list((Counter(self.slots) - Counter(taken)).elements())
        if not free:
            return None
        slot = min(free, key=lambda slot: (taken.count(slot), self.slots.index(slot)))
        self.slot_of[run.id] = slot
        return slot

    def _next(self) -> PlannedRun | None:
        """The first waiting run that may start; runs that another submitter has finished leave the list."""
        for run in list(self.waiting):
            state = self.plan.state(run)
            if state in ("finished", "diverged"):
                self.waiting.remove(run)
                self.present.append(run.id)
            elif state != "running" and not self._must_wait(run):
                self.waiting.remove(run)
                return run
        return None

    def _must_wait(self, run: PlannedRun) -> bool:
        """True while a run that this one starts from, by its weights or as a branch, is not done."""
        return any(before in self.active for before in run.starts_from) or any(
            other.id in run.starts_from for other in self.waiting
        )

    def _ended(self, run: PlannedRun, exit_code: int) -> None:
        directory = self.plan.directory(run)
        state = directory.state()
        if state in ("finished", "diverged"):
            self.trained.append(run.id)
        elif state == "failed":
            self.failed[run.id] = _reason(directory)
        elif exit_code > 0:  # it ended before it could record a reason; its log has one
            self.failed[run.id] = log_tail(directory)
            with contextlib.suppress(OSError):
                directory.note("end", step=0, outcome="failed", reason=self.failed[run.id])
        elif exit_code < 0:
            reason = note_kill(directory, exit_code)
            if self.starts[run.id] < MAX_STARTS:
                self.waiting.insert(0, run)
            else:
                self.failed[run.id] = f"{reason}, {MAX_STARTS} times"
        else:
            self.stopped.append(run.id)

    def _stop(self) -> None:
        """Request a shutdown of the runs that train, and kill those that still run after `GRACE_SECONDS`."""
        processes = [process for _, process in self.active.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(_Stop):  # a second Ctrl-C waits no longer
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        self.stopped += [run.id for run, _ in self.active.values()] + [run.id for run in self.waiting]
        self.active, self.waiting = {}, []

    def outcome(self) -> LocalOutcome:
        return LocalOutcome(
            plan=self.plan,
            trained=tuple(self.trained),
            present=tuple(self.present),
            failed=self.failed,
            stopped=tuple(self.stopped),
        )


def _slots(plan: CampaignPlan) -> list[str]:
    """GPUs, each as often as runs may share it; empty where runs use no GPU, or several."""
    placements = plan.placements.values()
    if all(table.device == "cpu" for table in placements) or any(table.devices > 1 for table in placements):
        return []
    return device_slots(min(table.runs_per_gpu for table in placements))


def _reason(directory: RunDirectory) -> str:
    return directory.failure() or f"no reason was recorded; see {directory.path / LOG}"


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Start the fork server with this many OpenMP threads: OpenMP reads the environment once, when it is loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["scaling.training.loop"])
    forkserver.ensure_running()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Stop

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
