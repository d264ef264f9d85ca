"""The local executor: trains what is missing of a plan on this machine, several runs at once.

Each run is its own process, so that one that is killed or runs out of memory takes no other with it. Processes come
from a server that has imported the training code once: the import takes ten seconds and more, a fork of it none. Who
trains what is decided by the run's own claim, so two submitters train each run once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec

from scaling.errors import UserError, os_error_sentence
from scaling.run.directory import LOG, RunDirectory
from scaling.run.provenance import changed_files
from scaling.spec import Placement
from scaling.training.pool import begin, device_slots, log_tail, note_kill, train_in_process
from sweeps.live import Live
from sweeps.planning.plan import CampaignPlan, PlannedRun, with_data

Retry = Literal["none", "failed", "diverged", "cancelled", "all"]
"""Runs that ended badly, or were ended, and are to be tried again."""

TRIES = 3
"""Times that a run which was killed from outside is started in one call, before it counts as failed."""

GRACE_SECONDS = 60.0
"""From the request to stop to the kill: a checkpoint is saved at the next step boundary."""

POLL_SECONDS = 0.5


def retries(retry: Retry, what: Literal["failed", "diverged", "cancelled"]) -> bool:
    """Whether runs of that kind are asked for."""
    return retry in (what, "all")


class LocalOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one call did, by run id."""

    plan: CampaignPlan
    """The plan with final ids: its data are prepared."""
    trained: tuple[str, ...]
    """Came to their end in this call."""
    present: tuple[str, ...]
    """Were done before."""
    failed: dict[str, str]
    """Failed now or earlier, with the reason."""
    stopped: tuple[str, ...]
    """Interrupted; the next call continues them."""

    @property
    def complete(self) -> bool:
        """Whether every run of the plan is done."""
        return not self.failed and not self.stopped


class _Stop(BaseException):
    """Asked to stop: Ctrl-C or SIGTERM."""


def run_local(
    plan: CampaignPlan,
    *,
    workers: int | None = None,
    retry: Retry = "none",
    order: Literal["cheap", "expensive"] = "cheap",
    progress: bool | None = None,
) -> LocalOutcome:
    """Train what is missing; leave alone what is done, and what failed under the placement that it has now.

    Args:
        plan: Its data are prepared first if need be.
        workers: Runs at the same time; by default as many as the processors allow at each run's threads. Runs that may
            use GPUs are at most ``runs_per_gpu`` on each of them.
        retry: Which runs are tried again although they failed or diverged.
        order: Whether the cheapest runs go first.
        progress: Bars (True), a line a minute (False), or what the output is fit for (None).

    Raises:
        UserError: The data cannot be prepared, or there are no workers.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, so no run would ever start. Use 1 or more.")
    plan = with_data(plan, progress=progress)
    plan.write()
    runs = sorted(plan.distinct(), key=lambda run: run.spec.budget.flops, reverse=order == "expensive")
    campaign = _Campaign(plan, runs, retry)
    if campaign.waiting:
        threads = max(table.threads for table in plan.placements.values())
        workers = workers or max(1, (os.cpu_count() or 1) // threads)
        campaign.slots = _slots(plan)
        workers = min(workers, len(campaign.slots) or workers)
        with Live(plan, progress=progress) as live, _threads(threads), _stop_signals():
            campaign.work(workers, live)
    return campaign.outcome()


class _Campaign:
    """What is waiting, what trains, and what became of the rest."""

    def __init__(self, plan: CampaignPlan, runs: list[PlannedRun], retry: Retry) -> None:
        self.plan = plan
        self.waiting: list[PlannedRun] = []
        self.active: dict[str, tuple[PlannedRun, ForkServerProcess]] = {}
        self.slots: list[str] = []
        self.slot_of: dict[str, str] = {}
        self.tries: dict[str, int] = {}
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

    def work(self, workers: int, live: Live) -> None:
        """Until nothing is left, or a stop is asked for."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["scaling.training.loop"])
        try:
            while self.waiting or self.active:
                while len(self.active) < workers and (run := self._next()) is not None:
                    directory = self.plan.directory(run)
                    # Not earlier: the placement in a failed run's directory is the one under which it failed.
                    try:
                        directory.create(run.spec, run.placement)
                    except OSError as error:
                        self.failed[run.id] = os_error_sentence(error)
                        continue
                    process = context.Process(target=train_in_process, args=(str(directory.path), self._slot(run)))
                    begin(process)
                    self.active[run.id] = run, process
                    self.tries[run.id] = self.tries.get(run.id, 0) + 1
                sentinels = [process.sentinel for _, process in self.active.values()]
                if sentinels:
                    connection.wait(sentinels, timeout=POLL_SECONDS)
                else:
                    time.sleep(POLL_SECONDS)
                for run, process in list(self.active.values()):
                    if not process.is_alive():
                        del self.active[run.id]
                        self._ended(run, process.exitcode or 0)
                live.update([run for run, _ in self.active.values()], waiting=self.waiting)
        except _Stop:
            live.say("stopping at the next step; the same command continues from there")
        finally:
            self._stop()

    def _slot(self, run: PlannedRun) -> str | None:
        """The GPU of a run: of those that are free, the first."""
        taken = [self.slot_of[other] for other in self.active if other in self.slot_of]
        free = list((Counter(self.slots) - Counter(taken)).elements())
        if not free:
            return None
        by_use = min(free, key=lambda slot: (taken.count(slot), self.slots.index(slot)))
        self.slot_of[run.id] = by_use
        return by_use

    def _next(self) -> PlannedRun | None:
        """The first waiting run that no other submitter is training; one that it has finished is taken off the list."""
        for run in list(self.waiting):
            state = self.plan.state(run)
            if state in ("finished", "diverged"):
                self.waiting.remove(run)
                self.present.append(run.id)
            elif state != "running" and not self._is_to_come(run):
                self.waiting.remove(run)
                return run
        return None

    def _is_to_come(self, run: PlannedRun) -> bool:
        """Whether a run that this one starts from, by its weights or as a branch, waits or trains now."""
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
        elif exit_code > 0:  # it ended before it could note why, and its log says so
            self.failed[run.id] = log_tail(directory)
            with contextlib.suppress(OSError):
                directory.note("end", step=0, outcome="failed", reason=self.failed[run.id])
        elif exit_code < 0:
            reason = note_kill(directory, exit_code)
            if self.tries[run.id] < TRIES:
                self.waiting.insert(0, run)
            else:
                self.failed[run.id] = f"{reason}, {TRIES} times"
        else:
            self.stopped.append(run.id)

    def _stop(self) -> None:
        """Ask what still trains to save and leave; kill what does not within `GRACE_SECONDS`."""
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
    """GPUs by run that may be active; empty where none is wanted, none is there, or a run spreads over several."""
    tables = plan.placements.values()
    if all(table.device == "cpu" for table in tables) or any(table.devices > 1 for table in tables):
        return []
    return device_slots(min(table.runs_per_gpu for table in tables))


def _reason(directory: RunDirectory) -> str:
    return directory.failure() or f"no reason was recorded; see {directory.path / LOG}"


def placement_changed(directory: RunDirectory, placement: Placement) -> bool:
    """Whether a run is to be executed otherwise than at its last attempt, so that what failed then may not fail now."""
    try:
        return directory.placement() != placement
    except UserError:
        return True


def changed_code(plan: CampaignPlan) -> list[PlannedRun]:
    """Runs that other code trained, as far as their records say, and all that start from one of them."""
    found: dict[str, PlannedRun] = {}
    before = -1
    runs = [run for run in plan.distinct() if plan.directory(run).spec_file.exists()]
    while len(found) > before:
        before = len(found)
        for run in runs:
            record = plan.directory(run).record() if run.id not in found else None
            if run.starts_from & found.keys() or (record is not None and changed_files(record.code)):
                found[run.id] = run
    return list(found.values())


def set_aside(plan: CampaignPlan, runs: Iterable[PlannedRun]) -> list[Path]:
    """Move the directories of runs to ``replaced/`` under the root, so that the runs are trained again.

    A run that trains now stays.

    Returns:
        Where they are now.
    """
    moved = []
    for run in runs:
        directory = plan.directory(run)
        with directory.claim(wait=False) as held:
            if not held:
                continue
            folder = plan.root / "replaced"
            folder.mkdir(exist_ok=True)
            number = sum(1 for _ in folder.glob(f"{run.id}-*")) + 1
            moved.append(directory.path.rename(folder / f"{run.id}-{number}"))
    return moved


def forget_divergence(directory: RunDirectory) -> None:
    """Let a diverged run start anew; what it was stays beside, under another name."""
    with directory.claim() as held:
        if not held or not directory.record_file.exists():
            return
        number = sum(1 for _ in directory.path.glob("diverged-*.json")) + 1
        for point in directory.checkpoints.glob("*"):
            point.unlink()
        directory.metrics_file.unlink(missing_ok=True)
        directory.record_file.rename(directory.path / f"diverged-{number}.json")


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    """OpenMP is told its threads when it is loaded, which the fork server does; so the environment says it first."""
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
