"""Selection of the runs of a plan that need a job, and `Submission`, the value that describes a call of submit.

A run needs a job unless it is done, pending, running, failed for a reason, or cancelled.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from typing import Literal

import msgspec

from scaling.errors import UserError
from sweeps.config.placement import SlurmConfig
from sweeps.planning.cost import hours_text, plan_costs
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.planning.retry import Retry, placement_changed, retries
from sweeps.slurm import bad_nodes, requeue
from sweeps.slurm.array_records import CANCELLED
from sweeps.slurm.queue_state import QueueSnapshot
from sweeps.slurm.sbatch import batch_script, job_placement

MAX_ATTEMPTS = 20
"""Jobs of one run above which a longer time limit is recommended: each waits in the queue."""


class JobGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Runs with the same request that start after the same jobs, and so can share arrays."""

    slurm: SlurmConfig
    runs: tuple[PlannedRun, ...]
    per_task: int = 1
    """Runs of a job, side by side."""

    @property
    def tasks(self) -> int:
        """Number of jobs."""
        return -(-len(self.runs) // self.per_task)


class Submission(msgspec.Struct, kw_only=True):
    """Result of a submission, done or as a dry run: run ids by what became of them."""

    plan: CampaignPlan
    groups: list[JobGroup]
    """Runs that need a job, in the order of submission."""
    done: list[str] = msgspec.field(default_factory=list)
    already_active: list[str] = msgspec.field(default_factory=list)
    """Pending or running before this call."""
    queued: list[str] = msgspec.field(default_factory=list)
    """Submitted by this call."""
    failed: list[str] = msgspec.field(default_factory=list)
    """Wait for ``--retry failed``."""
    cancelled: list[str] = msgspec.field(default_factory=list)
    """Cancelled by a person; wait for ``--retry cancelled``."""
    unknown: list[str] = msgspec.field(default_factory=list)
    """The state of their jobs is not known, so they are left alone."""
    rejected: list[str] = msgspec.field(default_factory=list)
    """Not accepted by SLURM now, or they start from a run that has no job; the same command submits them later."""
    jobs: list[str] = msgspec.field(default_factory=list)
    """Array job ids of this call."""
    notes: list[str] = msgspec.field(default_factory=list)

    @property
    def missing(self) -> list[PlannedRun]:
        """Runs that need a job."""
        return [run for group in self.groups for run in group.runs]

    @property
    def gpu_hours(self) -> float:
        """Predicted for `missing`; 0 if no GPUs are requested. Runs that share a device share its hours."""
        costs = plan_costs(self.plan)
        return sum(costs[run.id].hours * self.plan.placements[run.rung].gpus for run in self.missing)

    def requests(self) -> list[str]:
        """The request of each group's jobs, with the predicted attempts and warnings, as sentences."""
        costs = plan_costs(self.plan)
        return [self._request(group, max(costs[run.id].hours for run in group.runs)) for group in self.groups]

    def _request(self, group: JobGroup, hours: float) -> str:
        slurm, table = group.slurm, self.plan.placements[group.runs[0].rung]
        rungs = ", ".join(dict.fromkeys(run.rung for run in group.runs))
        counts = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time_minutes")
        values = ", ".join(f"{name} = {getattr(slurm, name)}" for name in counts)
        jobs = "1 job" if group.tasks == 1 else f"{group.tasks} jobs"
        sentences = [f"{jobs} ({rungs}), each with {values}, memory {slurm.memory or 'not stated'}."]
        if table.on_cuda and not slurm.gpus_per_node and "gres" not in slurm.sbatch:
            sentences += ["Its runs train on GPUs and the job requests none: set gpus_per_node in [placement.slurm]."]
        if group.per_task == 1 and slurm.devices > table.processes:
            sentences.append(
                f"A run uses {table.processes} of its {slurm.devices} GPUs, and the others stay idle: set "
                "tasks_per_node to the GPUs of a node, or request fewer."
            )
        usable = slurm.time_minutes / 60 - slurm.signal_seconds / 3600
        if (attempts := math.ceil(hours / usable)) > 1:
            sentences.append(f"The longest run takes {hours_text(hours)}, so about {attempts:,} jobs in sequence.")
            sentences += ["Raise time_minutes in [placement.slurm]."] if attempts > MAX_ATTEMPTS else []
        return " ".join(sentences)

    def scripts(self) -> list[str]:
        """The batch scripts, one for each group."""
        return [batch_script(self.plan, group.slurm, token="TOKEN", tasks=group.tasks) for group in self.groups]


def classify_runs(
    plan: CampaignPlan, snapshot: QueueSnapshot, *, retry: Retry, order: Literal["cheap", "expensive"]
) -> Submission:
    """The runs of a plan by what submit does with them; reads files and changes nothing. See `submit_slurm`."""
    found = Submission(plan=plan, groups=[], notes=[*snapshot.states.notes, *bad_nodes.describe_bad_nodes(plan.root)])
    missing: list[PlannedRun] = []
    advice = Counter[str]()
    folder = plan.root / "runs"
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    bad = set(bad_nodes.bad_nodes(plan.root))
    for run in sorted(plan.distinct(), key=lambda run: run.spec.budget.flops, reverse=order == "expensive"):
        if run.id not in present:
            missing.append(run)
            continue
        state, directory = plan.state(run), plan.directory(run)
        location, task = snapshot.locations.get(run.id), snapshot.task(run.id)
        is_active = task is not None and task.is_active
        is_cancelled = (directory.path / CANCELLED).exists()
        # Its neighbours may still train in a job that will not start it again: the run counts as one without a job.
        has_left_its_job = (
            is_active
            and snapshot.shares_its_job(run.id)
            and not directory.is_locked()
            and (is_cancelled or requeue.reason_abandoned(directory) is not None)
        )
        if state in ("finished", "diverged") and not (state == "diverged" and retries(retry, "diverged")):
            found.done.append(run.id)
            continue
        if not has_left_its_job:
            if state == "running" or is_active:
                found.already_active.append(run.id)
                advice.update([task.advice] if task is not None and task.advice is not None else [])
                continue
            if location is not None and (not snapshot.states.queue_reached or (task and task.verdict == "unknown")):
                found.unknown.append(run.id)
                continue
            if location is not None and location.job is None:
                found.already_active.append(run.id)  # another submitter works on it; `reconcile` has left it alone
                continue
            # SLURM itself cancels a job that waits for one that failed.
            is_cancelled |= task is not None and task.verdict == "cancelled" and not snapshot.predecessor_failed(run.id)
            if is_cancelled and not retries(retry, "cancelled"):
                found.cancelled.append(run.id)
                continue
        if state == "failed" and not retries(retry, "failed") and not _may_succeed_now(plan, run, bad):
            found.failed.append(run.id)
        elif is_cancelled and not retries(retry, "cancelled"):
            found.cancelled.append(run.id)
        else:
            missing.append(run)
    found.notes += [f"{count} waiting: {sentence}" for sentence, count in advice.items()]
    found.groups = _groups(plan, missing)
    return found


def _may_succeed_now(plan: CampaignPlan, run: PlannedRun, bad: set[str]) -> bool:
    """True if a failed run's placement has changed, or it failed at its start on a node that is excluded from now on."""
    directory = plan.directory(run)
    if placement_changed(directory, job_placement(plan, run, plan.placements[run.rung].slurm)):
        return True
    if bad:
        failed = {(f.run, f.job, f.restart) for f in bad_nodes.failures(plan.root) if f.node in bad}
        with contextlib.suppress(UserError):  # raised for a history that cannot be read; the run then counts as failed
            return any((run.id, line.job, line.restart) in failed for line in requeue.exits(directory)[-1:])
    return False


def _groups(plan: CampaignPlan, missing: list[PlannedRun]) -> list[JobGroup]:
    """Runs that can share an array: those that start from the same runs, so that one run that fails takes down no others.

    Runs that start from others come after them.
    """
    groups: dict[tuple[int, tuple[str, ...], bytes, int], list[PlannedRun]] = {}
    depth: dict[str, int] = {}
    by_id = {run.id: run for run in missing}

    def level(run: PlannedRun) -> int:
        if run.id not in depth:
            before = [level(by_id[other]) for other in run.starts_from if other in by_id]
            depth[run.id] = 1 + max(before, default=0) if run.starts_from else 0
        return depth[run.id]

    for run in missing:
        table = plan.placements[run.rung]
        job_placement(plan, run, table.slurm)  # raises before anything is submitted
        if table.runs_per_gpu > 1 and table.processes > 1:
            raise UserError(
                f'{plan.campaign.file}, rung "{run.rung}": runs_per_gpu is {table.runs_per_gpu}, and a run uses several '
                "processes; set runs_per_gpu = 1, or nodes, tasks_per_node and devices = 1."
            )
        key = (level(run), tuple(sorted(run.starts_from)), msgspec.json.encode(table.slurm), table.runs_per_task)
        groups.setdefault(key, []).append(run)
    return [
        JobGroup(slurm=plan.placements[groups[key][0].rung].slurm, runs=tuple(groups[key]), per_task=key[3])
        for key in sorted(groups, key=lambda key: key[0])
    ]
