"""Verbs about runs that were submitted: is the cluster fit, what does a run say, end it, clear up after it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from scaling.cli.common import OnCampaign, OnRun

if TYPE_CHECKING:
    from sweeps.planning.plan import CampaignPlan, PlannedRun


@dataclass(frozen=True)
class Doctor(OnCampaign):
    """Check the cluster before money is spent: partitions, limits, GPUs, the shared root, the environment."""

    probe: bool = False
    """Submit a job of at most a minute for each kind of placement, and wait for it."""

    def run(self) -> None:
        """Print the checks; status 1 if one fails."""
        from sweeps.slurm.doctor import examine, show

        checks = examine(self.planned(), probe=self.probe)
        show(checks)
        if any(check.verdict == "fail" for check in checks):
            sys.exit(1)


@dataclass(frozen=True)
class _OnRuns(OnCampaign):
    arm: str | None = None
    """Only runs of this arm."""
    rung: str | None = None
    """Only runs of this rung."""
    only: str | None = None
    """Only the run whose id begins so."""

    def chosen(self, plan: CampaignPlan) -> list[PlannedRun]:
        """The runs that the options name; all without any."""
        from sweeps.planning.run_operations import select

        return select(plan, arm=self.arm, rung=self.rung, run=self.only)


@dataclass(frozen=True)
class Logs(OnRun):
    """Print what a run has printed."""

    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on as it prints more, until it is done."""

    def run(self) -> None:
        """Print the log."""
        from scaling.run.directory import RunDirectory
        from sweeps.planning.run_operations import show_log

        show_log(RunDirectory(self.run_dir), follow=self.follow)


@dataclass(frozen=True)
class Cancel(_OnRuns):
    """End runs on SLURM, each at a checkpoint; they stay cancelled until they are asked for again."""

    def run(self) -> None:
        """Cancel the jobs of the runs chosen."""
        from sweeps.slurm import SlurmExecutor

        plan = self.planned()
        chosen = self.chosen(plan)
        jobs = SlurmExecutor(plan).cancel(chosen)
        here = [run.id for run in chosen if plan.directory(run).is_locked()]
        if here and not jobs:
            print(
                f"{plan.campaign.name}: {len(here)} runs train on this machine and not as jobs. Press Ctrl-C where scaling "
                "submit runs, or send its process SIGTERM: each run stops at a checkpoint, and submit continues it."
            )
            return
        if not jobs:
            print(f"{plan.campaign.name}: none of its runs waits or runs on SLURM, so there is nothing to cancel.")
            return
        print(f"{plan.campaign.name}: {len(jobs)} jobs were asked to end{': ' if jobs else ''}{', '.join(jobs)}.")


@dataclass(frozen=True)
class Clean(_OnRuns):
    """Delete the checkpoints of runs that are done; weights, metrics and records stay."""

    dry_run: bool = False
    """Only say what would go."""

    def run(self) -> None:
        """Delete, and say how much."""
        from sweeps.planning.run_operations import clean

        plan = self.planned()
        files, size = clean(plan, self.chosen(plan), dry_run=self.dry_run)
        done = "would be deleted" if self.dry_run else "deleted"
        print(f"{plan.campaign.name}: {len(files)} checkpoints, {size / 1e6:,.1f} MB {done}.")
