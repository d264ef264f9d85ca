"""What of a plan has to be handed to SLURM: not what is done, waits, runs, failed for a reason, or was cancelled."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from scaling.errors import UserError
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.planning.retry import Retry, placement_changed, retries
from sweeps.slurm import array_records, bad_nodes, job_exits
from sweeps.slurm.client import SlurmTask
from sweeps.slurm.queue_state import QueueSnapshot
from sweeps.slurm.sbatch import job_placement
from sweeps.slurm.submission import JobGroup, Submission


def sort(plan: CampaignPlan, seen: QueueSnapshot, *, retry: Retry, order: Literal["cheap", "expensive"]) -> Submission:
    """The runs by what is to be done with them; looks and changes nothing.

    Args:
        plan: What is wished for.
        seen: What SLURM says.
        retry: Which runs that ended badly or were cancelled count as missing.
        order: Whether the cheapest runs go first.

    Raises:
        UserError: A placement cannot be used.
    """
    found = Submission(plan=plan, classes=[], notes=[*seen.answer.notes, *bad_nodes.sentences(plan.root)])
    missing: list[PlannedRun] = []
    waiting = Counter[str]()
    folder = plan.root / "runs"
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    bad = set(bad_nodes.bad_nodes(plan.root))
    tables = {rung: table.slurm for rung, table in plan.placements.items()}
    for run in sorted(plan.distinct(), key=lambda run: run.spec.budget.flops, reverse=order == "expensive"):
        if run.id not in present:
            missing.append(run)
            continue
        state = plan.state(run)
        place, task = seen.places.get(run.id), seen.task(run.id)
        alive = task is not None and task.verdict in ("pending", "running")
        if state in ("finished", "diverged") and not (state == "diverged" and retries(retry, "diverged")):
            found.done.append(run.id)
        elif alive and place is not None and place.array.per_task > 1 and _out_of_its_pack(plan, run):
            # Its neighbours still train. The job does not start it again, and a new claim would keep it from doing so.
            _sort_ended(found, missing, run, state=state, retry=retry, bad=bad, slurm=tables[run.rung])
        elif state == "running" or alive:
            found.joined.append(run.id)
            if task is not None and task.advice is not None:
                waiting[task.advice] += 1
        elif (place is not None and not seen.answer.queue_reached) or (task is not None and task.verdict == "unknown"):
            found.unknown.append(run.id)
        elif place is not None and place.job is None:
            found.joined.append(run.id)  # another submitter is at it; `repair` has left it alone
        elif _was_cancelled(plan, run, task, seen) and not retries(retry, "cancelled"):
            found.cancelled.append(run.id)
        else:
            _sort_ended(found, missing, run, state=state, retry=retry, bad=bad, slurm=tables[run.rung])
    found.notes += [f"{count} waiting: {advice}" for advice, count in waiting.items()]
    found.classes = _classes(plan, missing, tables)
    return found


def prerequisites(run: PlannedRun) -> frozenset[str]:
    """Runs that this one starts from, by their weights or as a branch of their course."""
    return run.starts_from


def _sort_ended(
    found: Submission,
    missing: list[PlannedRun],
    run: PlannedRun,
    *,
    state: str,
    retry: Retry,
    bad: set[str],
    slurm: SlurmConfig,
) -> None:
    """A run that no job has any more."""
    if (
        state == "failed"
        and not retries(retry, "failed")
        and not _failed_on_a_bad_node(found.plan, run, bad)
        and not placement_changed(found.plan.directory(run), job_placement(found.plan, run, slurm))
    ):
        found.failed.append(run.id)
        return
    if (found.plan.directory(run).path / array_records.CANCELLED).exists() and not retries(retry, "cancelled"):
        found.cancelled.append(run.id)
        return
    missing.append(run)


def _failed_on_a_bad_node(plan: CampaignPlan, run: PlannedRun, bad: set[str]) -> bool:
    """Whether the run's last job failed at its start, on a node that is left out from now on."""
    last = job_exits.read_exits(plan.directory(run))[-1:]
    return bool(last and bad) and any(
        (failure.run, failure.job, failure.restart) == (run.id, last[0].job, last[0].restart) and failure.node in bad
        for failure in bad_nodes.failures(plan.root)
    )


def _out_of_its_pack(plan: CampaignPlan, run: PlannedRun) -> bool:
    directory = plan.directory(run)
    return not directory.is_locked() and (
        job_exits.reason_abandoned(directory) is not None or (directory.path / array_records.CANCELLED).exists()
    )


def _was_cancelled(plan: CampaignPlan, run: PlannedRun, task: SlurmTask | None, seen: QueueSnapshot) -> bool:
    """Whether a person ended it: not SLURM, which ends a job that waits for one that failed."""
    if (plan.directory(run).path / array_records.CANCELLED).exists():
        return True
    if task is None or task.verdict != "cancelled":
        return False
    return not seen.ended_with_its_predecessor(run.id)


def _classes(plan: CampaignPlan, missing: list[PlannedRun], tables: dict[str, SlurmConfig]) -> list[JobGroup]:
    """Runs that can share an array.

    Runs that start from others come after them, and share an array only with those that start from the same: one run
    that fails takes along what starts from it, and nothing else.
    """
    groups: dict[tuple[int, tuple[str, ...], bytes, int], tuple[SlurmConfig, list[PlannedRun]]] = {}
    depth: dict[str, int] = {}
    by_id = {run.id: run for run in missing}

    def level(run: PlannedRun) -> int:
        if run.id not in depth:
            before = [level(by_id[other]) for other in prerequisites(run) if other in by_id]
            depth[run.id] = 1 + max(before, default=0) if prerequisites(run) else 0
        return depth[run.id]

    for run in missing:
        table = plan.placements[run.rung].slurm
        job_placement(plan, run, table)  # refuses before anything is submitted
        key = (level(run), tuple(sorted(prerequisites(run))), msgspec.json.encode(table), _per_task(plan, run))
        groups.setdefault(key, (table, []))[1].append(run)
    return [
        JobGroup(slurm=groups[key][0], runs=tuple(groups[key][1]), per_task=key[3])
        for key in sorted(groups, key=lambda key: key[0])
    ]


def _per_task(plan: CampaignPlan, run: PlannedRun) -> int:
    table = plan.placements[run.rung]
    wished = table.runs_per_gpu
    if wished > 1 and table.processes > 1:
        raise UserError(
            f'{plan.campaign.file}, rung "{run.rung}": runs_per_gpu is {wished}, and a run is spread over several '
            "processes. Either share a device among runs, or a run among devices: set runs_per_gpu = 1, or nodes, "
            "tasks and devices = 1."
        )
    return table.runs_per_task
