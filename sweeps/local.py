"""The local executor: trains the missing runs of a plan on this machine, several at once.

Each run has a process of its own, so a run that is killed or runs out of memory does not affect the others. A run trains
only while its process holds the run's own lock, so two submitters at once train each run once.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import msgspec

from scaling.errors import UserError, os_error_sentence
from scaling.run.directory import LOG, RunDirectory
from scaling.run.progress import ProgressReporter
from scaling.training.pool import ProcessPool, device_slots, log_tail, note_kill, train_in_process
from scaling.training.shutdown import ShutdownRequest
from sweeps.planning.plan import CampaignPlan, PlannedRun, with_data
from sweeps.planning.retry import Retry, forget_divergence, placement_changed, retries
from sweeps.planning.run_state import run_status

MAX_STARTS = 3
"""Starts of a run in one call before a run that is killed from outside counts as failed."""

GRACE_SECONDS = 60.0
"""Time between the request to stop and the kill; a checkpoint is saved at the next step boundary."""

POLL_SECONDS = 0.5


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
        progress: Bars (True), a line a minute (False), or bars if stderr is a terminal (None).

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
        executor.work(min(workers, len(executor.slots) or workers), threads=threads, progress=progress)
    return executor.outcome()


class CampaignProgress:
    """Progress of the active runs, and of all runs together by their FLOPs, the total of the reporter."""

    def __init__(self, plan: CampaignPlan, reporter: ProgressReporter) -> None:
        self.plan, self.reporter = plan, reporter
        self.flops = {run.id: run.spec.budget.flops for run in plan.distinct()}
        self._shown: dict[str, PlannedRun] = {}

    def update(self, active: Iterable[PlannedRun], waiting: Iterable[PlannedRun]) -> None:
        """Show shares and losses; the metrics are read only if the reporter is due."""
        now = {run.id: run for run in active}
        for run in [run for run in self._shown.values() if run.id not in now]:
            last, name = run_status(self.plan, run), f"{run.arm} {run.cell}"
            loss = "" if last.loss is None else f", loss {last.loss:.3f}"
            self.reporter.remove_part(name)
            self.reporter.print(f"{name} {last.state} at {last.share:.0%}{loss}")
        self._shown = now
        if not self.reporter.due:
            return
        left = {run.id: 1.0 for run in waiting}
        for run in now.values():
            status = run_status(self.plan, run)
            left[run.id] = 1.0 - status.share
            fields = {} if status.loss is None else {"loss": f"{status.loss:.3f}"}
            self.reporter.update_part(f"{run.arm} {run.cell}", status.share, **fields)
        done = sum(flops * (1.0 - left.get(run, 0.0)) for run, flops in self.flops.items())
        self.reporter.update(done, ended=f"{len(self.flops) - len(left)} of {len(self.flops)} runs")


class _LocalExecutor:
    """Runs of a plan that wait, those that train, and the outcome of the others."""

    def __init__(self, plan: CampaignPlan, runs: list[PlannedRun], retry: Retry) -> None:
        self.plan = plan
        self.waiting: list[PlannedRun] = []
        self.active: dict[str, PlannedRun] = {}
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

    def work(self, workers: int, *, threads: int, progress: bool | None) -> None:
        """Train until nothing is left or a stop is requested."""
        name, total = self.plan.campaign.name, sum(run.spec.budget.flops for run in self.plan.distinct())
        stop = ShutdownRequest()
        with ProgressReporter(name, total, bar=progress) as reporter:
            reporter.print(f"{name}: {len(self.waiting)} runs to train; loading the training code")
            shown = CampaignProgress(self.plan, reporter)
            with ProcessPool(threads=threads) as pool:
                try:
                    with stop.listening():
                        while (self.waiting or self.active) and not stop.due():
                            while len(self.active) < workers and (run := self._next()) is not None:
                                self._start(pool, run)
                            for worker in pool.wait(POLL_SECONDS):
                                self._ended(self.active.pop(worker.name), worker.code)
                            shown.update(self.active.values(), self.waiting)
                    if stop.due():
                        reporter.print("stopping at the next step; the same command continues from there")
                finally:
                    with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait
                        pool.stop(GRACE_SECONDS)
        self.stopped += [*self.active, *(run.id for run in self.waiting)]

    def _start(self, pool: ProcessPool, run: PlannedRun) -> None:
        directory = self.plan.directory(run)
        try:  # not earlier: until here the directory holds the placement under which the run last failed
            directory.create(run.spec, run.placement)
        except OSError as error:
            self.failed[run.id] = os_error_sentence(error)
            return
        pool.start(run.id, train_in_process, str(directory.path), self._slot(run))
        self.active[run.id] = run
        self.starts[run.id] += 1

    def _slot(self, run: PlannedRun) -> str | None:
        """The GPU for a run: the least used one with a free slot."""
        taken = Counter(self.slot_of[other] for other in self.active if other in self.slot_of)
        free = Counter(self.slots) - taken
        if not free:
            return None
        self.slot_of[run.id] = min(free, key=lambda slot: (taken[slot], self.slots.index(slot)))
        return self.slot_of[run.id]

    def _next(self) -> PlannedRun | None:
        """The first waiting run that may start; runs that another submitter has finished leave the list."""
        for run in list(self.waiting):
            state = self.plan.state(run)
            if state in ("finished", "diverged"):
                self.waiting.remove(run)
                self.present.append(run.id)
            elif state != "running" and not run.starts_from & {*self.active, *(other.id for other in self.waiting)}:
                self.waiting.remove(run)
                return run
        return None

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
