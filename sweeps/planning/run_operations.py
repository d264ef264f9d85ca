"""Operations on the runs of a plan, of any executor: select them, print their logs, delete their checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from scaling.errors import UserError, unknown_name
from scaling.run.directory import LOG, RunDirectory
from sweeps.planning.plan import CampaignPlan, PlannedRun

FOLLOW_SECONDS = 1.0


def select(
    plan: CampaignPlan, *, arm: str | None = None, rung: str | None = None, run: str | None = None
) -> list[PlannedRun]:
    """The runs of an arm, a rung, both, or one run by the start of its id.

    Raises:
        UserError: A name is not in the plan, or the start of an id fits no run or several.
    """
    for kind, name in (("arm", arm), ("rung", rung)):
        known = {getattr(planned, kind) for planned in plan.runs}
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
