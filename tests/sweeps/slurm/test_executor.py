"""Submission, the state of the queue, and cancellation, one after the other."""

from __future__ import annotations

from typing import Any

from sweeps.planning.plan import CampaignPlan
from sweeps.slurm.queue_state import queue_snapshot
from sweeps.slurm.submit import cancel_slurm, submit_slurm


def test_submitted_runs_are_in_the_queue_and_can_be_cancelled(ready: CampaignPlan, commands: Any) -> None:
    commands.idle(sbatch="echo Submitted batch job 5", scancel='echo "$@" >> $(dirname $0)/cancelled')
    assert len(submit_slurm(ready, dry_run=True).missing) == 4
    assert queue_snapshot(ready.root).arrays == []
    queued = submit_slurm(ready).queued
    assert sorted(queue_snapshot(ready.root).locations) == sorted(queued)
    one = next(run for run in ready.runs if run.id == queued[1])
    assert cancel_slurm(ready, [one]) == ["5_1"]
    assert len(cancel_slurm(ready, ready.distinct())) == 4
    assert (commands.folder / "cancelled").read_text().splitlines() == ["5_1", "5_0 5_1 5_2 5_3"]
