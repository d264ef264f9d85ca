"""Bad nodes and hanging processes, found without a person."""

from __future__ import annotations

import os
import signal

import pytest
from cluster import Cluster
from conftest import Counting, assert_finished_once, row_of, starts, wait_for_steps, wait_until_done
from waiting import until

from sweeps.slurm import array_records
from sweeps.slurm.bad_nodes import bad_nodes, describe_bad_nodes
from sweeps.slurm.queue_state import queue_snapshot

pytestmark = pytest.mark.cluster


def test_a_node_with_two_failed_starts_is_excluded(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=20, slurm="time_minutes = 5\ncpus_per_task = 8")  # one run on each node
    (planned.root / "broken-node").write_text("node2")
    counting.submit(planned)
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)
    assert bad_nodes(planned.root) == {"node2": 2}
    assert describe_bad_nodes(planned.root)[0].startswith("node2 is excluded")
    again = counting.plan(steps=21, slurm="time_minutes = 5\ncpus_per_task = 8")
    submission = counting.submit(again)
    assert any("node2 is excluded" in note for note in submission.notes)
    assert "ExcNodeList=node2" in cluster.run("scontrol", "show", "job", submission.jobs[0])


def test_a_node_that_fails_jobs_early_is_excluded_by_the_next_submission(cluster: Cluster, counting: Counting) -> None:
    profile = counting.folder / "profile.toml"
    profile.write_text("setup = ['[ \"$SLURMD_NODENAME\" != node2 ] || exit 1']\n")
    planned = counting.plan(steps=10, slurm="time_minutes = 5\ncpus_per_task = 8")
    counting.submit(planned)
    until(lambda: not cluster.run("squeue", "-h"), "the jobs did not end")
    until(lambda: len(list(queue_snapshot(planned.root).failed_starts())) >= 2, "the accounting is behind")
    again = counting.submit(planned)
    assert again.queued
    assert bad_nodes(planned.root).keys() == {"node2"}
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)


def test_a_hanging_process_is_killed_and_its_run_continues(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=40, slurm="time_minutes = 5\nstall_seconds = 8")
    victim = planned.runs[0]
    directory = planned.directory(victim)
    counting.submit(planned)
    wait_for_steps(planned, victim, step=15)
    os.kill(starts(directory)[-1].pid, signal.SIGSTOP)
    wait_until_done(planned)
    assert_finished_once(planned, redone=10)
    assert "took no step for 8 s" in (directory.attempts()[1].reason or "")
    assert all(len(starts(planned.directory(run))) == 1 for run in planned.runs[1:])
    assert not row_of(planned, victim).reason
    assert not (directory.path / array_records.CANCELLED).exists()
