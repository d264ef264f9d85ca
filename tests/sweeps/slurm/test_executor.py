"""`SlurmExecutor`, the entry point of the package."""

from __future__ import annotations

from typing import Any

from sweeps.planning.plan import CampaignPlan
from sweeps.slurm import SlurmExecutor


def test_the_executor_submits_reports_and_cancels(ready: CampaignPlan, commands: Any) -> None:
    executor = SlurmExecutor(ready)
    commands.idle(sbatch="echo Submitted batch job 5", scancel='echo "$@" >> $(dirname $0)/cancelled')
    assert len(executor.submit(dry_run=True).missing) == 4
    assert executor.status().arrays == []
    queued = executor.submit().queued
    assert sorted(executor.status().locations) == sorted(queued)
    one = next(run for run in ready.runs if run.id == queued[1])
    assert executor.cancel([one]) == ["5_1"]
    assert len(executor.cancel()) == 4
    assert (commands.folder / "cancelled").read_text().splitlines() == ["5_1", "5_0 5_1 5_2 5_3"]
