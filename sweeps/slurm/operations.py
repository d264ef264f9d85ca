"""What a person does to runs that were submitted: cancel them, read their logs, clear their checkpoints away.

Each takes a selection of a campaign's runs; what it does not name is not touched.
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
from sweeps.slurm.client import Unreachable, ask
from sweeps.slurm.job_exits import reason_abandoned
from sweeps.slurm.queue_state import survey

FOLLOW_SECONDS = 1.0


def select(
    plan: CampaignPlan, *, arm: str | None = None, rung: str | None = None, run: str | None = None
) -> list[PlannedRun]:
    """The runs of an arm, a rung, both, or one run by the start of its id.

    Raises:
        UserError: A name is not in the plan, or the start of an id is not one run's.
    """
    for what, name, known in (
        ("arm", arm, {planned.arm for planned in plan.runs}),
        ("rung", rung, {planned.rung for planned in plan.runs}),
    ):
        if name is not None and name not in known:
            raise UserError(f"{plan.campaign.file}: {unknown_name(what, name, known)}")
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
    """Jobs that were asked to end; each saves a checkpoint first and stays cancelled until it is asked for again.

    Raises:
        UserError: SLURM cannot be asked; then nothing was cancelled.
    """
    seen = survey(plan.root)
    if not seen.answer.queue_reached:
        raise UserError(f"{' '.join(seen.answer.notes)} Nothing was cancelled; try again.")
    alive = {
        run.id: task.job
        for run in runs
        if (task := seen.task(run.id)) is not None and task.verdict in ("pending", "running")
    }
    for run in alive:
        (plan.root / "runs" / run / CANCELLED).touch()
    # A run that shares its job with others leaves by its mark; the job ends when they are all to be cancelled.
    asked = sorted(set(alive.values()))
    jobs = [job for job in asked if all(_leaves(plan.root, run) for run in seen.runs_of(job))]
    try:
        for start in range(0, len(jobs), 200):
            ask("scancel", *jobs[start : start + 200])
    except Unreachable as error:
        raise UserError(
            f"{error}. Some jobs may not have been cancelled; look with scaling status and try again."
        ) from None
    return asked


def _leaves(root: Path, run: str) -> bool:
    """Whether a run has no further part in its job."""
    directory = RunDirectory(root / "runs" / run)
    return (
        (directory.path / CANCELLED).exists()
        or directory.record_file.exists()
        or reason_abandoned(directory) is not None
    )


def clean(plan: CampaignPlan, runs: list[PlannedRun], *, dry_run: bool = True) -> tuple[list[Path], int]:
    """Checkpoints of runs that are done, and their bytes; deleted unless `dry_run`.

    Only files that a run of this plan wrote, by their names and places; links are not followed, runs that are not done
    keep everything, and so do weights, metrics and records.
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
    """Print what a run has printed, and go on as it prints more until it is done.

    Raises:
        UserError: It has printed nothing yet.
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
