"""State of the runs under a root in SLURM: submitted arrays matched with the queue and the accounting."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.slurm import array_records
from sweeps.slurm.array_records import ArrayRecord, Location
from sweeps.slurm.bad_nodes import NodeFailure
from sweeps.slurm.client import LOST, JobStates, SlurmTask, array_of, job_states
from sweeps.slurm.exit_codes import NOT_RECORDED

NEW_SECONDS = 10.0
"""Time after submission in which a job may be missing from the queue."""


@dataclass(frozen=True)
class QueueSnapshot:
    """Arrays, and the states of their jobs at one moment; empty if nothing was ever submitted from this root."""

    root: Path = Path()
    arrays: list[ArrayRecord] = field(default_factory=list)
    locations: dict[str, Location] = field(default_factory=dict)
    """Array and task of each run's last submission, by run id."""
    states: JobStates = field(default_factory=JobStates)

    def task(self, run: str) -> SlurmTask | None:
        """State of the run's last job; None without one, or if SLURM was not reached.

        A task that never started and is in no answer was cancelled if its array is known, or if there is no accounting: the
        accounting keeps no trace of such a task. If it does not know the array either, the controller has lost it.
        """
        location = self.locations.get(run)
        if location is None or location.job is None:
            return None
        found = self.states.tasks.get(location.job)
        if found is not None or not self.states.queue_reached:
            return found
        if 0 <= time.time() - location.array.time < NEW_SECONDS:
            return SlurmTask(location.job, "just submitted", "pending")
        if array_records.began(self.root, run, location.array):
            return SlurmTask(location.job, "forgotten", "ended")
        cancelled = (self.root / "runs" / run / array_records.CANCELLED).exists()
        known = any(
            array_of(job) == location.array.job and task.state != LOST for job, task in self.states.tasks.items()
        )
        if self.states.accounting_reached and not cancelled and not known:
            return SlurmTask(location.job, LOST, "ended")
        return SlurmTask(location.job, "cancelled before it started", "cancelled")

    def runs_of(self, job: str) -> tuple[str, ...]:
        """The runs of a task, ``<array job>_<index>``."""
        number, _, index = job.partition("_")
        return next((array.runs_of(int(index)) for array in self.arrays if array.job == number), ())

    def shares_its_job(self, run: str) -> bool:
        """True if other runs train beside it, so that its job goes on when it has ended."""
        location = self.locations.get(run)
        return location is not None and location.array.per_task > 1

    def predecessor_failed(self, run: str) -> bool:
        """True if SLURM dropped the run's waiting job because a job that it depends on did not succeed."""
        location = self.locations.get(run)
        if location is None or array_records.began(self.root, run, location.array):
            return False
        before = [self.states.tasks.get(job) for job in location.array.after]
        # Without accounting the answer is lost; then the run is submitted again, as it was the first time.
        return any(
            task is None or (task.verdict in ("ended", "cancelled") and task.state != "COMPLETED") for task in before
        )

    def failed_starts(self) -> list[NodeFailure]:
        """Jobs that failed on a node before they wrote anything into a run's directory."""
        found = []
        for run, location in self.locations.items():
            task = self.task(run)
            if task is None or task.node is None or task.exit_status == NOT_RECORDED:
                continue
            if task.state in ("FAILED", "BOOT_FAIL") and not array_records.began(self.root, run, location.array):
                found.append(NodeFailure(node=task.node, run=run, job=task.job, restart=0, time=time.time()))
        return found

    def gpu_hours(self, run: str) -> float:
        """GPU-hours of all jobs of a run, all attempts, from the accounting; its share of jobs with several runs."""
        seconds = 0.0
        for array in self.arrays:
            if run in array.runs:
                index = array.runs.index(run) // array.per_task
                if task := self.states.tasks.get(f"{array.job}_{index}"):
                    seconds += task.gpu_seconds / len(array.runs_of(index))
        return seconds / 3600


def queue_snapshot(root: Path) -> QueueSnapshot:
    """The array records with the present states of their jobs; SLURM is queried only if there are records."""
    arrays = array_records.all_arrays(root)
    if not arrays:
        return QueueSnapshot()
    submitted = {array.job: array for array in arrays if array.job is not None}
    counts = {job: array.tasks for job, array in submitted.items()}
    states = job_states({job: array.name for job, array in submitted.items()}, task_counts=counts)
    return QueueSnapshot(root=root, arrays=arrays, locations=array_records.locations(arrays), states=states)
