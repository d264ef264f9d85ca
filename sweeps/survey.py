"""What SLURM says about the runs under a root: the arrays that were submitted, matched with the queue and accounting."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from sweeps import arrays
from sweeps.arrays import ArrayRecord, Location
from sweeps.slurm import Answer, Task, look_up

NEW_SECONDS = 10.0
"""In which a job that was just submitted may not be in the queue yet."""


@dataclass(frozen=True)
class Survey:
    """Empty where nothing was ever submitted from this root; SLURM is not asked then."""

    root: Path = Path()
    records: list[ArrayRecord] = field(default_factory=list)
    places: dict[str, Location] = field(default_factory=dict)
    """Where each run was last handed to, by run id."""
    answer: Answer = field(default_factory=Answer)

    def task(self, run: str) -> Task | None:
        """SLURM's word on the run's last job; None where it had none, or SLURM was not reached.

        Of a task that is cancelled while it waits, SLURM keeps no trace. One that has left the queue and never began
        was therefore ended by a person; one that began and is forgotten is over.
        """
        place = self.places.get(run)
        if place is None or place.job is None or not self.answer.queue_reached:
            return None if place is None or place.job is None else self.answer.tasks.get(place.job)
        found = self.answer.tasks.get(place.job)
        if found is not None:
            return found
        if 0 <= time.time() - place.array.time < NEW_SECONDS:
            return Task(place.job, "just submitted", "pending")
        if arrays.began(self.root, run, place.array):
            return Task(place.job, "forgotten", "over")
        return Task(place.job, "cancelled before it began", "cancelled")

    def gpu_hours(self, run: str) -> float:
        """Spent on a run over all its jobs and all their attempts, as the accounting has it."""
        jobs = (f"{array.job}_{array.runs.index(run)}" for array in self.records if array.job and run in array.runs)
        return sum(task.gpu_seconds for job in jobs if (task := self.answer.tasks.get(job))) / 3600


def survey(root: Path) -> Survey:
    """One look at the records, the queue and the accounting."""
    records = arrays.all_arrays(root)
    if not records:
        return Survey()
    answer = look_up({array.job: array.name for array in records if array.job is not None})
    return Survey(root=root, records=records, places=arrays.locations(records), answer=answer)
