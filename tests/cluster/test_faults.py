"""Faults on a real SLURM, injected while a campaign runs: every run ends once, with an undisturbed run's numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from cluster import Cluster
from conftest import (
    Counting,
    assert_finished_once,
    faulty_snapshot,
    real_plan,
    row_of,
    starts,
    task_of,
    under_way,
    wait_for_steps,
    wait_until_done,
)
from waiting import status_of, until

from scaling.errors import UserError
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.reporting.status import status
from sweeps.slurm import array_records, sbatch
from sweeps.slurm.submit import submit_slurm

pytestmark = pytest.mark.cluster


def test_a_second_submission_does_nothing(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=20)
    first = counting.submit(planned)
    assert len(first.jobs) == 1
    assert len(first.queued) == 4
    again = counting.submit(planned)
    assert (len(again.already_active), again.jobs) == (4, [])
    wait_until_done(planned)
    assert len(counting.submit(planned).done) == 4
    assert_finished_once(planned, redone=0)
    assert all(len(starts(planned.directory(run))) == 1 for run in planned.runs)


def test_a_killed_task_continues_from_its_checkpoint(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan()
    victim = planned.runs[1]
    counting.submit(planned)
    wait_for_steps(planned, victim, step=15)
    os.kill(starts(planned.directory(victim))[-1].pid, signal.SIGKILL)
    wait_until_done(planned)
    assert_finished_once(planned, redone=10)
    assert [attempt.step for attempt in starts(planned.directory(victim))] == [0, 10]


def test_a_run_that_is_always_killed_is_abandoned(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(slurm="time_minutes = 5\nmax_kills = 2")
    victim = planned.runs[0]
    directory = planned.directory(victim)
    directory.create(victim.spec, victim.placement)
    (directory.path / "fault-kill").write_text("3")
    counting.submit(planned)
    until(lambda: row_of(planned, victim).state == "failed", "it was not given up")
    reason = row_of(planned, victim).reason or ""
    assert "2 attempts were killed without a step of progress" in reason
    assert "its log ends" in reason
    until(lambda: sum(run.state == "finished" for run in status(planned)) == 3, "the others did not finish")
    assert counting.submit(planned).failed == [victim.id]
    (directory.path / "fault-kill").unlink()
    assert counting.submit(planned, retry="failed").queued == [victim.id]
    wait_until_done(planned)
    assert_finished_once(planned)


def test_a_failed_run_waits_for_retry(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=20)
    victim = planned.runs[0]
    directory = planned.directory(victim)
    directory.create(victim.spec, victim.placement)
    (directory.path / "fault-raise").write_text("3")
    counting.submit(planned)
    until(lambda: row_of(planned, victim).state == "failed", "it did not fail")
    assert len(starts(directory)) == 1
    assert row_of(planned, victim).reason == "requested by the test"


def test_a_crashed_node_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, counting: Counting, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = counting.plan(
        steps=60, step_seconds=0.1, slurm="time_minutes = 5\ncpus_per_task = 5"
    )  # one run on each node
    (tmp_path / "wide").mkdir()
    both = real_plan(tiny_text, tmp_path / "wide", slurm="time_minutes = 5\nnodes = 2", steps=800, every=0.2)
    both = msgspec.structs.replace(both, runs=both.runs[:1])
    with monkeypatch.context() as real:
        real.setattr(sbatch, "take_snapshot", faulty_snapshot)
        submit_slurm(both)
    wait_for_steps(both, both.runs[0], step=2)
    counting.submit(planned)
    wait_for_steps(planned, planned.runs[0], planned.runs[1], step=12)
    crashed = not both.directory(both.runs[0]).record_file.exists()
    cluster.crash_node("node2")
    wait_until_done(planned)
    assert_finished_once(planned, redone=12)
    assert counting.submit(planned).jobs == []
    cluster.start_node("node2")  # the run on two nodes waits for a second one
    wait_until_done(both)
    wide = both.directory(both.runs[0])
    assert crashed, "the run on two nodes was over before the crash; give it more steps"
    assert len(starts(wide)) >= 2  # SLURM may ask it to save once more, before its time limit
    assert starts(wide)[1].step > 0
    assert [row.step for row in wide.metrics()] == sorted({row.step for row in wide.metrics()})


def test_a_crashed_controller_is_reported(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=150)
    counting.submit(planned)
    wait_for_steps(planned, *planned.runs, step=10)
    time.sleep(3)
    cluster.crash_controller()
    from sweeps.slurm.queue_state import queue_snapshot

    assert any("queue was not reached" in note for note in queue_snapshot(planned.root).states.notes)
    with pytest.raises(UserError, match="SLURM was not reached"):
        counting.submit(planned)
    cluster.start_controller()
    wait_until_done(planned)
    assert_finished_once(planned)
    assert all(len(starts(planned.directory(run))) == 1 for run in planned.runs)


def test_a_crash_under_a_young_job_starts_nothing_twice(cluster: Cluster, counting: Counting) -> None:
    """SLURM queues jobs that the controller had not saved again, while they run or after they have ended."""
    planned = counting.plan(steps=100)
    counting.submit(planned)
    until(lambda: any(planned.directory(run).is_locked() for run in planned.runs), "nothing started")
    cluster.crash_controller()
    time.sleep(3)
    cluster.start_controller()
    until(lambda: all(over_or_explained(planned, run) for run in planned.runs), "neither done nor explained")
    cluster.start()  # drained nodes come back, as their administrator would have them
    for run in planned.runs:
        if "scontrol release" in (row_of(planned, run).reason or ""):
            cluster.run("scontrol", "release", task_of(planned, run))
    counting.submit(planned)  # what SLURM has lost
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)


def over_or_explained(planned: CampaignPlan, run: PlannedRun) -> bool:
    """True if the run has its record, or `status` reports its job as held or lost, with a remedy."""
    reason = row_of(planned, run).reason or ""
    return planned.directory(run).record_file.exists() or "scontrol release" in reason or "submitting again" in reason


def test_a_cancelled_run_waits_for_retry(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=60, slurm="time_minutes = 5\nmax_parallel = 2")
    counting.submit(planned)
    running, waiting = planned.runs[0], planned.runs[-1]
    wait_for_steps(planned, running, step=5)
    for run in (running, waiting):
        cluster.run("scancel", task_of(planned, run))
    until(lambda: sum(row.state == "finished" for row in status(planned)) == 2, "the others did not finish")
    until(lambda: sorted(counting.submit(planned).cancelled) == sorted([running.id, waiting.id]), "not cancelled")
    assert "--retry cancelled" in (row_of(planned, waiting).reason or "")
    assert len(counting.submit(planned, retry="cancelled").queued) == 2
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)  # the running one saved a checkpoint when it was cancelled


def test_signals_at_random_moments_cost_no_step(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=60)
    counting.submit(planned)
    moments = random.Random(5)
    sent = 0
    until(lambda: any(under_way(planned, run) for run in planned.runs), "nothing started")
    while sent < 8 and not all(planned.directory(run).record_file.exists() for run in planned.runs):
        time.sleep(moments.uniform(0.1, 0.6))
        run = moments.choice(planned.runs)
        # A second one may fall into the save after the first, or into the start of the next attempt.
        cluster.run("scancel", "--signal=USR2", task_of(planned, run), check=False)
        sent += 1
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert sum(len(starts(planned.directory(run))) for run in planned.runs) > 4


def test_preemption_costs_no_step(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=80, slurm='time_minutes = 5\npartition = "low"\ncpus_per_task = 4')
    counting.submit(planned)
    wait_for_steps(planned, *planned.runs, step=5)
    urgent = ["sbatch", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 3", "-o", "/dev/null"]
    cluster.run(*urgent)
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert all(len(starts(planned.directory(run))) >= 2 for run in planned.runs)


def test_a_short_time_limit_divides_a_run(cluster: Cluster, counting: Counting) -> None:
    # SLURM looks at limits every few seconds and may ask up to a minute early: it asks this run of 35 s after 10 to 25 s.
    planned = counting.plan(steps=70, step_seconds=0.5, slurm="time_minutes = 1\nsignal_seconds = 50")
    counting.submit(planned)
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert all(len(starts(planned.directory(run))) >= 2 for run in planned.runs)


def test_a_step_longer_than_the_time_limit_is_abandoned(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=2, step_seconds=600, slurm="time_minutes = 5\nmax_kills = 1")
    planned = msgspec.structs.replace(planned, runs=planned.runs[:1])
    victim = planned.runs[0]
    counting.submit(planned)
    until(lambda: starts(planned.directory(victim)), "it did not start")
    cluster.run("scontrol", "update", f"JobId={task_of(planned, victim)}", "EndTime=now+1")
    until(lambda: counting.submit(planned).failed == [victim.id], "it was not given up", every=0.5)
    assert "1 attempt was killed without a step of progress, by the time limit" in (
        row_of(planned, victim).reason or ""
    )


def test_forgotten_jobs_are_submitted_again(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(slurm='time_minutes = 5\nsbatch = { begin = "now+1hour" }')
    first = counting.submit(planned)
    cluster.lose_state()
    until(lambda: counting.submit(planned).queued == first.queued, "they are not submitted again", every=0.5)


def test_the_submitters_folder_may_vanish(
    cluster: Cluster, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = counting.plan(steps=10)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    submission = counting.submit(planned)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").rmdir()
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert f"WorkDir={planned.root}" in cluster.run("scontrol", "show", "job", submission.jobs[0])


SUBMIT = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import conftest
from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import plan
from sweeps.slurm import sbatch
from sweeps.slurm.submit import submit_slurm
sbatch.take_snapshot = conftest.counting_snapshot
{fault}
print(submit_slurm(plan(load_campaign({file!r}), {root!r})).queued)
"""

KILLED_AFTER_SBATCH = """
import os, signal
launch = sbatch.launch
sbatch.launch = lambda *rest: (launch(*rest), os.kill(os.getpid(), signal.SIGKILL))
"""

KILLED_BEFORE_SBATCH = """
import os, signal
sbatch.launch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def submitter(counting: Counting, fault: str = "") -> subprocess.Popen[bytes]:
    """A submitter in a process of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    text = SUBMIT.format(
        paths=paths, file=str(counting.folder / "count.toml"), root=str(counting.folder / "root"), fault=fault
    )
    return subprocess.Popen([sys.executable, "-c", text])


def test_two_submitters_submit_each_run_once(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=20)
    both = [submitter(counting), submitter(counting)]
    assert [status_of(process) for process in both] == [0, 0]
    assert sum(len(array.runs) for array in array_records.all_arrays(planned.root)) == 4
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert all(len(starts(planned.directory(run))) == 1 for run in planned.runs)


@pytest.mark.parametrize("fault", [KILLED_AFTER_SBATCH, KILLED_BEFORE_SBATCH], ids=["after sbatch", "before sbatch"])
def test_an_interrupted_submission_is_reconciled(
    cluster: Cluster, counting: Counting, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = counting.plan(steps=20)
    assert status_of(submitter(counting, fault)) == -signal.SIGKILL
    (begun,) = array_records.all_arrays(planned.root)
    assert begun.job is None
    monkeypatch.setattr("sweeps.slurm.array_records.SBATCH_SECONDS", 2.0)
    again = counting.submit(planned)
    adopted = fault == KILLED_AFTER_SBATCH
    assert (len(again.already_active) + len(again.done), len(again.queued)) == ((4, 0) if adopted else (0, 4))
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert all(len(starts(planned.directory(run))) == 1 for run in planned.runs)


@pytest.mark.parametrize("accounting", ["none", "stopped"])
def test_a_campaign_finishes_without_accounting(
    cluster: Cluster, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounting: str
) -> None:
    if accounting == "stopped":
        cluster.stop_accounting()  # the next test finds it started again
    else:
        shims = tmp_path / "bin"
        shims.mkdir()
        (shims / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
        (shims / "sacct").chmod(0o755)
        monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    planned = counting.plan(steps=60, slurm="time_minutes = 5\nmax_parallel = 3")
    counting.submit(planned)
    waiting = planned.runs[-1]
    wait_for_steps(planned, planned.runs[0], step=5)
    cluster.run("scancel", task_of(planned, waiting))
    os.kill(starts(planned.directory(planned.runs[0]))[-1].pid, signal.SIGKILL)
    until(lambda: sum(row.state == "finished" for row in status(planned)) == 3, "the others did not finish")
    until(lambda: counting.submit(planned).cancelled == [waiting.id], "not cancelled")
    assert any("accounting was not reached" in note for note in counting.submit(planned).notes)
    counting.submit(planned, retry="cancelled")
    wait_until_done(planned)
    assert_finished_once(planned)
