"""Verbs on the cluster and on submitted runs: doctor, logs, cancel, clean."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from scaling.cli.common import OnCampaign, OnRun
from scaling.errors import ExitCode

if TYPE_CHECKING:
    from sweeps.planning.plan import CampaignPlan, PlannedRun


@dataclass(frozen=True)
class Doctor(OnCampaign):
    """Check the cluster before submitting: partitions, limits, GPUs, the shared root, the environment."""

    probe: bool = False
    """Also submit a job of at most one minute for each distinct placement, and wait for it."""

    def run(self) -> None:
        """Print the checks; exit status 1 if one fails."""
        from sweeps.slurm.doctor import examine, show

        checks = examine(self.planned(), probe=self.probe)
        show(checks)
        if any(check.verdict == "fail" for check in checks):
            sys.exit(ExitCode.FAILURE)


@dataclass(frozen=True)
class _OnRuns(OnCampaign):
    arm: str | None = None
    """Only runs of this arm."""
    rung: str | None = None
    """Only runs of this rung."""
    only: str | None = None
    """Only the run whose id starts with these digits."""

    def chosen(self, plan: CampaignPlan) -> list[PlannedRun]:
        """The runs that the options select, all by default."""
        from sweeps.planning.run_operations import select

        return select(plan, arm=self.arm, rung=self.rung, run=self.only)


@dataclass(frozen=True)
class Logs(OnRun):
    """Print the log of a run."""

    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Continue with new output until the run is done."""

    def run(self) -> None:
        """Print the log."""
        from scaling.run.directory import RunDirectory
        from sweeps.planning.run_operations import show_log

        show_log(RunDirectory(self.run_dir), follow=self.follow)


@dataclass(frozen=True)
class Cancel(_OnRuns):
    """Stop runs on SLURM, each at a checkpoint; submit --retry cancelled continues them."""

    def run(self) -> None:
        """Cancel the jobs of the selected runs."""
        from sweeps.slurm import SlurmExecutor

        plan = self.planned()
        chosen = self.chosen(plan)
        jobs = SlurmExecutor(plan).cancel(chosen)
        if jobs:
            text = f"requested {len(jobs)} jobs to stop: {', '.join(jobs)}."
        elif here := sum(plan.directory(run).is_locked() for run in chosen):
            text = (
                f"{here} runs train on this machine and not as jobs. To stop them at a checkpoint, press Ctrl-C where "
                "scaling submit runs, or send that process SIGTERM."
            )
        else:
            text = "none of its runs is queued or running on SLURM; nothing to cancel."
        print(f"{plan.campaign.name}: {text}")


@dataclass(frozen=True)
class Clean(_OnRuns):
    """Delete the checkpoints of runs that are done; weights, metrics and records are kept."""

    dry_run: bool = False
    """Only print what would be deleted."""

    def run(self) -> None:
        """Delete the checkpoints and print their size."""
        from sweeps.planning.run_operations import clean

        plan = self.planned()
        files, size = clean(plan, self.chosen(plan), dry_run=self.dry_run)
        done = "would be deleted" if self.dry_run else "deleted"
        print(f"{plan.campaign.name}: {len(files)} checkpoints, {size / 1e6:,.1f} MB {done}.")
