"""What a call of `sweeps.slurm.submit` did or would do, as a value that says it in sentences."""

from __future__ import annotations

import math

import msgspec

from sweeps.config.placement import SlurmConfig
from sweeps.planning.cost import hours_text, plan_costs
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.slurm.sbatch import batch_script

MANY_ATTEMPTS = 20
"""Jobs of one run, from which a longer time limit is recommended: each waits in the queue and starts anew."""


class JobGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Runs that ask SLURM for the same thing after the same jobs, and so can share arrays."""

    slurm: SlurmConfig
    runs: tuple[PlannedRun, ...]
    per_task: int = 1
    """Runs of a job, side by side."""

    @property
    def tasks(self) -> int:
        """Jobs that this takes."""
        return -(-len(self.runs) // self.per_task)


class Submission(msgspec.Struct, kw_only=True):
    """Run ids by what became of them."""

    plan: CampaignPlan
    classes: list[JobGroup]
    """What is missing, by placement, in the order of submission."""
    done: list[str] = msgspec.field(default_factory=list)
    joined: list[str] = msgspec.field(default_factory=list)
    """Waiting or running already."""
    queued: list[str] = msgspec.field(default_factory=list)
    """Handed to SLURM by this call."""
    failed: list[str] = msgspec.field(default_factory=list)
    """Wait for ``--retry failed``."""
    cancelled: list[str] = msgspec.field(default_factory=list)
    """Cancelled by a person; wait for ``--retry cancelled``."""
    unknown: list[str] = msgspec.field(default_factory=list)
    """Their jobs could not be looked up, so they are left alone."""
    left: list[str] = msgspec.field(default_factory=list)
    """Not accepted by SLURM now; the same command submits them later."""
    jobs: list[str] = msgspec.field(default_factory=list)
    """Array job ids of this call."""
    notes: list[str] = msgspec.field(default_factory=list)

    @property
    def missing(self) -> list[PlannedRun]:
        """What would be submitted."""
        return [run for group in self.classes for run in group.runs]

    @property
    def gpu_hours(self) -> float:
        """Predicted for what is missing; 0 where no GPUs are asked for. Runs that share a device share its hours."""
        costs = plan_costs(self.plan)
        return sum(costs[run.id].hours * self.plan.placements[run.rung].gpus for run in self.missing)

    def requests(self) -> list[str]:
        """What the jobs of each class ask SLURM for, with the predicted attempts and what does not fit, as sentences."""
        costs = plan_costs(self.plan)
        return [self._request(group, max(costs[run.id].hours for run in group.runs)) for group in self.classes]

    def _request(self, group: JobGroup, hours: float) -> str:
        asked, table = group.slurm, self.plan.placements[group.runs[0].rung]
        rungs = ", ".join(dict.fromkeys(run.rung for run in group.runs))
        sentences = [
            f"{group.tasks} {'job' if group.tasks == 1 else 'jobs'} ({rungs}), each with nodes = {asked.nodes}, gpus_per_node = "
            f"{asked.gpus_per_node}, tasks_per_node = {asked.tasks_per_node}, cpus_per_task = {asked.cpus_per_task}, memory {asked.memory or 'not stated'}, time_minutes = "
            f"{asked.time_minutes}."
        ]
        if table.on_cuda and not asked.gpus_per_node and "gres" not in asked.sbatch:
            sentences.append(
                "Its runs train on GPUs and the job asks for none: set gpus_per_node in [placement.slurm]."
            )
        if group.per_task == 1 and asked.devices > table.processes:
            sentences.append(
                f"A run has {table.processes} of its {asked.devices} GPUs, and the others stay idle: set tasks_per_node to the GPUs "
                "of a node, or ask for fewer."
            )
        usable = asked.time_minutes / 60 - asked.signal_seconds / 3600
        if usable <= 0:
            sentences.append(
                f"It is asked to save {asked.signal_seconds} s before its end, which is at its start: raise time_minutes."
            )
        elif (attempts := math.ceil(hours / usable)) > 1:
            sentences.append(
                f"The longest run takes {hours_text(hours)}, so about {attempts:,} jobs one after the other."
            )
            sentences += ["Raise minutes in [placement.slurm]."] if attempts > MANY_ATTEMPTS else []
        return " ".join(sentences)

    def scripts(self) -> list[str]:
        """The batch scripts, one for each placement."""
        return [
            batch_script(
                self.plan, group.slurm, name=f"{self.plan.campaign.name}-TOKEN", token="TOKEN", tasks=group.tasks
            )
            for group in self.classes
        ]
