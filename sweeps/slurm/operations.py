"""Operations on submitted runs: cancel them, print their logs, delete their checkpoints.

Each takes a selection of a campaign's runs and does not touch the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from scaling.errors import UserError, unknown_name
from scaling.run.directory import LOG, RunDirectory
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.slurm.array_records import CANCELLED
from sweeps.slurm.client import CommandError, run_slurm
from sweeps.slurm.queue_state import queue_snapshot
from sweeps.slurm.requeue import is_over, reason_abandoned

FOLLOW_SECONDS = 1.0
MAX_SCANCEL_IDS = 200


def select(
    plan: CampaignPlan, *, arm: str | None = None, rung: str | None = None, run: str | None = None
) -> list[PlannedRun]:
    """The runs of an arm, a rung, both, or one run by the start of its id.

    Raises:
        UserError: A name is not in the plan, or the start of an id fits no run or several.
    """
    for kind, name, known in (
        ("arm", arm, {planned.arm for planned in plan.runs}),
        ("rung", rung, {planned.rung for planned in plan.runs}),
    ):
        if name is not None and name not in known:
            raise UserError(f"{plan.campaign.file}: {unknown_name(kind, name, known)}")
    chosen = [
        planned
        for planned in plan.distinct()
        if (arm is None or planned.arm == arm)
        and (rung is None or planned.rung == rung)
        and (run is None or planned.id.startswith(run))
    ]
    if run is not None and len(chosen) != 1:
        found = "no run of this plan begins" if not chosen else f"{len(chosen)} runs of this plan begin"
        raise UserError(f'{plan.campaign.file}: {found} with "{run}". Give more of an id, as scaling status shows it.')
    return chosen


def cancel(plan: CampaignPlan, runs: list[PlannedRun]) -> list[str]:
    """Cancel the jobs of some runs; their ids. Each run saves a checkpoint first and stays cancelled until it is retried.

    Raises:
        UserError: SLURM was not reached; then nothing was cancelled.
    """
    snapshot = queue_snapshot(plan.root)
    if not snapshot.states.queue_reached:
        raise UserError(f"{' '.join(snapshot.states.notes)} Nothing was cancelled; try again.")
    active = {run.id: task.job for run in runs if (task := snapshot.task(run.id)) is not None and task.is_active}
    for run in active:
        (plan.root / "runs" / run / CANCELLED).touch()
    # A run that shares its job with others leaves by its mark; the job ends when all of them are cancelled.
    jobs = sorted(set(active.values()))
    whole = []
    for job in jobs:
        members = [RunDirectory(plan.root / "runs" / run) for run in snapshot.runs_of(job)]
        if all(is_over(member) or reason_abandoned(member) is not None for member in members):
            whole.append(job)
    try:
        for start in range(0, len(whole), MAX_SCANCEL_IDS):
            run_slurm("scancel", *whole[start : start + MAX_SCANCEL_IDS])
    except CommandError as error:
        raise UserError(
            f"{error}. Some jobs may not have been cancelled; look with scaling status and try again."
        ) from None
    return jobs


def clean(plan: CampaignPlan, runs: list[PlannedRun], *, dry_run: bool = True) -> tuple[list[Path], int]:
    """Checkpoints of runs that are done, and their bytes; deleted unless `dry_run`.

    Only files that a run of this plan wrote, by their names and places; links are not followed. Runs that are not done
    keep everything; weights, metrics and records stay.
    """
    files = []
    for run in runs:
        directory = plan.directory(run)
        if plan.state(run) not in ("finished", "diverged") or directory.checkpoints.is_symlink():
            continue
        files += [file for file in sorted(directory.checkpoints.glob("step-*.ckpt")) if not file.is_symlink()]
    size = sum(file.stat().st_size for file in files)
    if not dry_run:
        for file in files:
            file.unlink(missing_ok=True)
    return files, size


def show_log(
    directory: RunDirectory, *, follow: bool = False, write: Callable[[str], object] = sys.stdout.write
) -> None:
    """Print a run's log, and with `follow` what is added to it until the run is done.

    Raises:
        UserError: There is no log yet.
    """
    log = directory.path / LOG
    if not log.exists():
        raise UserError(
            f"{log}: the run has printed nothing yet; its state is {directory.state()}. "
            "Submit its campaign, or look again once it trains."
        )
    with log.open(errors="replace") as file:
        write(file.read())
        while follow and directory.state() in ("running", "queued", "preempted"):
            time.sleep(FOLLOW_SECONDS)
            write(file.read())
        write(file.read())
