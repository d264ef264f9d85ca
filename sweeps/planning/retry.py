"""Runs to train again: failed, diverged or cancelled ones, and those that other code trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from scaling.run.provenance import changed_files
from scaling.spec import Placement
from sweeps.planning.plan import CampaignPlan, PlannedRun

Retry = Literal["none", "failed", "diverged", "cancelled", "all"]
"""Kinds of unsuccessful runs that are tried again."""


def retries(retry: Retry, what: Literal["failed", "diverged", "cancelled"]) -> bool:
    """True if runs of one kind are tried again."""
    return retry in (what, "all")


def placement_changed(directory: RunDirectory, placement: Placement) -> bool:
    """True if a run's placement differs from that of its last attempt, so that a failure may not repeat."""
    try:
        return directory.placement() != placement
    except UserError:
        return True


def forget_divergence(directory: RunDirectory) -> None:
    """Let a diverged run start anew; its record is renamed to ``diverged-<n>.json``."""
    with directory.claim() as held:
        if not held or not directory.record_file.exists():
            return
        number = sum(1 for _ in directory.path.glob("diverged-*.json")) + 1
        for checkpoint in directory.checkpoints.glob("*"):
            checkpoint.unlink()
        directory.metrics_file.unlink(missing_ok=True)
        directory.record_file.rename(directory.path / f"diverged-{number}.json")


def changed_code(plan: CampaignPlan) -> list[PlannedRun]:
    """Runs whose records name other code than the present one, and all runs that start from one of them."""
    found, before = dict[str, PlannedRun](), -1
    runs = [run for run in plan.distinct() if plan.directory(run).spec_file.exists()]
    while len(found) > before:
        before = len(found)
        for run in runs:
            record = plan.directory(run).record() if run.id not in found else None
            if run.starts_from & found.keys() or (record is not None and changed_files(record.code)):
                found[run.id] = run
    return list(found.values())


def set_aside(plan: CampaignPlan, runs: Iterable[PlannedRun]) -> list[Path]:
    """Move run directories to ``replaced/`` under the root, so that the runs are trained again; their new paths.

    A run that trains now is left in place.
    """
    moved = []
    for run in runs:
        directory = plan.directory(run)
        with directory.claim(wait=False) as held:
            if not held:
                continue
            folder = plan.root / "replaced"
            folder.mkdir(exist_ok=True)
            number = sum(1 for _ in folder.glob(f"{run.id}-*")) + 1
            moved.append(directory.path.rename(folder / f"{run.id}-{number}"))
    return moved
