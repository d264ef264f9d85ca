"""The SLURM executor: submission, the jobs, requeueing after a job, and the state of the queue.

docs/slurm.md describes the life of a job and the states of a run, and docs/run-directory.md the files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sweeps.planning.plan import CampaignPlan, PlannedRun
    from sweeps.slurm.queue_state import QueueSnapshot
    from sweeps.slurm.select_runs import Submission

__all__ = ["SlurmExecutor"]


class SlurmExecutor:
    """Runs a plan as SLURM jobs. It has no state of its own: every method reads the run root and asks SLURM."""

    def __init__(self, plan: CampaignPlan) -> None:
        self.plan = plan

    def submit(
        self,
        *,
        retry: Literal["none", "failed", "diverged", "cancelled", "all"] = "none",
        order: Literal["cheap", "expensive"] = "cheap",
        dry_run: bool = False,
        max_gpu_hours: float | None = None,
        snapshot: bool = True,
    ) -> Submission:
        """Submit the runs that are missing; see `sweeps.slurm.submit.submit_slurm`. Calling it again is safe."""
        from sweeps.slurm.submit import submit_slurm

        return submit_slurm(
            self.plan, retry=retry, order=order, dry_run=dry_run, max_gpu_hours=max_gpu_hours, snapshot=snapshot
        )

    def status(self) -> QueueSnapshot:
        """Submitted arrays with the state of their jobs in the queue and the accounting."""
        from sweeps.slurm.queue_state import queue_snapshot

        return queue_snapshot(self.plan.root)

    def cancel(self, runs: list[PlannedRun] | None = None) -> list[str]:
        """End the jobs of some runs, or of all, each after a checkpoint; returns their ids."""
        from sweeps.slurm.submit import cancel_slurm

        return cancel_slurm(self.plan, self.plan.distinct() if runs is None else runs)
