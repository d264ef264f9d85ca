"""Several runs in one job: each an ordinary run, independent of its neighbours."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import (
    Counting,
    assert_finished_once,
    numbers_of,
    real_plan,
    row_of,
    starts,
    task_of,
    wait_for_steps,
    wait_until_done,
)
from waiting import until

from sweeps.planning.plan import CampaignPlan
from sweeps.reporting.status import status
from sweeps.slurm import SlurmExecutor
from sweeps.slurm.submit import submit_slurm

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_profile")]


def test_runs_side_by_side_have_the_numbers_of_runs_alone(
    cluster: Cluster, local: CampaignPlan, tiny_text: Path, tmp_path: Path
) -> None:
    packed = real_plan(tiny_text, tmp_path, runs_per_gpu=4)
    submission = submit_slurm(packed)
    assert len({task_of(packed, run) for run in packed.runs}) == 1
    assert "#SBATCH --array=0-0%1" in submission.scripts()[0]
    wait_until_done(packed)
    assert numbers_of(packed) == numbers_of(local)


def test_a_kill_and_a_failure_do_not_affect_neighbours(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=60, runs_per_gpu=4)
    failing, killed, *others = planned.runs
    planned.directory(failing).create(failing.spec, failing.placement)
    (planned.directory(failing).path / "fault-raise").write_text("3")
    counting.submit(planned)
    wait_for_steps(planned, killed, step=15)
    os.kill(starts(planned.directory(killed))[-1].pid, signal.SIGKILL)
    until(lambda: sum(row.state == "finished" for row in status(planned)) == 3, "the others did not finish")
    assert [attempt.step for attempt in starts(planned.directory(killed))] == [0, 10]
    assert all(len(starts(planned.directory(run))) == 1 for run in others)
    assert row_of(planned, failing).state == "failed"
    assert row_of(planned, failing).reason == "requested by the test"
    assert counting.submit(planned).failed == [failing.id]
    (planned.directory(failing).path / "fault-raise").unlink()
    assert counting.submit(planned, retry="failed").queued == [failing.id]
    wait_until_done(planned)
    assert_finished_once(planned)


def test_preemption_reaches_all_runs_of_a_job_and_cancellation_one(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=100, slurm='time_minutes = 5\npartition = "low"', runs_per_gpu=4)
    counting.submit(planned)
    wait_for_steps(planned, *planned.runs, step=5)
    unwanted = planned.runs[0]
    SlurmExecutor(planned).cancel([unwanted])
    until(lambda: not planned.directory(unwanted).is_locked(), "the cancelled run did not stop")
    cluster.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    until(lambda: sum(row.state == "finished" for row in status(planned)) == 3, "the others did not finish")
    assert all(len(starts(planned.directory(run))) == 2 for run in planned.runs[1:])
    assert len(starts(planned.directory(unwanted))) == 1
    until(lambda: counting.submit(planned).cancelled == [unwanted.id], "it does not count as cancelled")
    counting.submit(planned, retry="cancelled")
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
