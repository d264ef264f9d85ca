"""What SLURM says about the runs under a root: the arrays that were submitted, matched with the queue and accounting."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.slurm import array_records
from sweeps.slurm.array_records import ArrayRecord, Location
from sweeps.slurm.bad_nodes import NodeFailure
from sweeps.slurm.client import LOST, JobStates, SlurmTask, look_up
from sweeps.slurm.job_exits import UNNOTED

NEW_SECONDS = 10.0
"""In which a job that was just submitted may not be in the queue yet."""


@dataclass(frozen=True)
class QueueSnapshot:
    """Empty where nothing was ever submitted from this root; SLURM is not asked then."""

    root: Path = Path()
    records: list[ArrayRecord] = field(default_factory=list)
    places: dict[str, Location] = field(default_factory=dict)
    """Where each run was last handed to, by run id."""
    answer: JobStates = field(default_factory=JobStates)

    def task(self, run: str) -> SlurmTask | None:
        """What SLURM says about the run's last job; None where it had none, or SLURM was not reached.

        The accounting keeps no trace of a single array task that is cancelled while it waits, but of its array it does.
        A task that never began and is in no answer was therefore cancelled if its array is known, or if there is no
        accounting to tell; if the accounting answers and does not know the array, the controller has lost it.
        """
        place = self.places.get(run)
        if place is None or place.job is None or not self.answer.queue_reached:
            return None if place is None or place.job is None else self.answer.tasks.get(place.job)
        found = self.answer.tasks.get(place.job)
        if found is not None:
            return found
        if 0 <= time.time() - place.array.time < NEW_SECONDS:
            return SlurmTask(place.job, "just submitted", "pending")
        if array_records.began(self.root, run, place.array):
            return SlurmTask(place.job, "forgotten", "over")
        cancelled = (self.root / "runs" / run / array_records.CANCELLED).exists()
        if self.answer.accounting_reached and not cancelled and not self.answer.knows(place.job.split("_")[0]):
            return SlurmTask(place.job, LOST, "over")
        return SlurmTask(place.job, "cancelled before it began", "cancelled")

    def runs_of(self, job: str) -> tuple[str, ...]:
        """The runs of a task, ``<array job>_<index>``."""
        number, _, index = job.partition("_")
        return next((array.runs_of(int(index)) for array in self.records if array.job == number), ())

    def shares_its_job(self, run: str) -> bool:
        """Whether other runs are trained beside it, so that its job goes on when it has ended."""
        place = self.places.get(run)
        return place is not None and place.array.per_task > 1

    def ended_with_its_predecessor(self, run: str) -> bool:
        """Whether SLURM dropped the run's waiting job since one that it was to start after did not end well."""
        place = self.places.get(run)
        if place is None or not place.array.after or array_records.began(self.root, run, place.array):
            return False
        before = [self.answer.tasks.get(job) for job in place.array.after]
        # Without accounting nobody remembers; then it is asked for again, as it was when it was submitted.
        return any(
            task is None or (task.verdict in ("over", "cancelled") and task.state != "COMPLETED") for task in before
        )

    def jobs_that_never_began(self) -> list[NodeFailure]:
        """Jobs that failed on a node without coming as far as to say so in a run's directory."""
        return [
            NodeFailure(node=task.node, run=run, job=task.job, restart=0, time=time.time())
            for run, place in self.places.items()
            if (task := self.task(run)) is not None
            and task.state in ("FAILED", "BOOT_FAIL")
            and task.node is not None
            and task.status != UNNOTED
            and not array_records.began(self.root, run, place.array)
        ]

    def gpu_hours(self, run: str) -> float:
        """Spent on a run over all its jobs and all their attempts, as the accounting has it; its part of shared ones."""
        spent = 0.0
        for array in self.records:
            if array.job is None or run not in array.runs:
                continue
            index = array.runs.index(run) // array.per_task
            if task := self.answer.tasks.get(f"{array.job}_{index}"):
                spent += task.gpu_seconds / len(array.runs_of(index))
        return spent / 3600


def survey(root: Path) -> QueueSnapshot:
    """One look at the records, the queue and the accounting."""
    records = array_records.all_arrays(root)
    if not records:
        return QueueSnapshot()
    submitted = {array.job: array for array in records if array.job is not None}
    answer = look_up(
        {job: array.name for job, array in submitted.items()},
        tasks_of={job: array.tasks for job, array in submitted.items()},
    )
    return QueueSnapshot(root=root, records=records, places=array_records.locations(records), answer=answer)
