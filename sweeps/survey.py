"""What SLURM says about the runs under a root: the arrays that were submitted, matched with the queue and accounting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sweeps import arrays
from sweeps.arrays import ArrayRecord, Location
from sweeps.slurm import Answer, Task, look_up


@dataclass(frozen=True)
class Survey:
    """Empty where nothing was ever submitted from this root; SLURM is not asked then."""

    records: list[ArrayRecord] = field(default_factory=list)
    places: dict[str, Location] = field(default_factory=dict)
    """Where each run was last handed to, by run id."""
    answer: Answer = field(default_factory=Answer)

    def task(self, run: str) -> Task | None:
        """SLURM's word on the run's last job, if it has one."""
        place = self.places.get(run)
        return None if place is None or place.job is None else self.answer.tasks.get(place.job)

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
    return Survey(records=records, places=arrays.locations(records), answer=answer)
