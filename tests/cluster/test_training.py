"""Real training under SLURM: the numbers of the local executor, on one task, several tasks, and several nodes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cluster import Cluster
from conftest import real_plan, starts, wait_for_steps, wait_until_done
from safetensors.numpy import load_file
from waiting import until

from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.slurm.submit import submit_slurm

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_profile")]


def only_one(plan: CampaignPlan) -> tuple[CampaignPlan, PlannedRun]:
    """The plan with one run left, Muon's on the first rung."""
    run = next(run for run in plan.runs if run.rung == "a" and run.arm == "muon")
    return msgspec.structs.replace(plan, runs=(run,)), run


@pytest.mark.parametrize("slurm", ["tasks_per_node = 2", "nodes = 2"])
def test_several_tasks_train_to_the_weights_of_one(
    cluster: Cluster, local: CampaignPlan, tiny_text: Path, tmp_path: Path, slurm: str
) -> None:
    there, keep = only_one(real_plan(tiny_text, tmp_path, slurm=f"time_minutes = 5\n{slurm}"))
    assert len(submit_slurm(there).queued) == 1
    wait_until_done(there)
    record, alone = there.directory(keep).record(), local.directory(keep).record()
    assert record is not None
    assert alone is not None
    # The gradients of two halves are added in another order than those of the whole: rounding, and nothing else.
    assert record.validation_loss == pytest.approx(alone.validation_loss, rel=1e-5)
    weights, expected = (load_file(p.directory(keep).weights_file) for p in (there, local))
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_signal_or_a_kill_of_one_rank_ends_both(cluster: Cluster, tiny_text: Path, tmp_path: Path) -> None:
    there, run = only_one(
        real_plan(tiny_text, tmp_path, slurm="time_minutes = 5\ntasks_per_node = 2", steps=600, every=0.2)
    )
    directory = there.directory(run)
    submit_slurm(there)

    def ranks() -> list[int]:
        """The two processes of the present attempt, the one that keeps the books first."""
        first = starts(directory)[-1].pid
        others = [pid for pid in cluster.processes() if b"sweeps.slurm.job" in command_of(pid) and pid != first]
        return [first, *(pid for pid in others if b"srun" not in command_of(pid))]

    wait_for_steps(there, run, step=2)
    os.kill(ranks()[1], signal.SIGTERM)
    until(lambda: len(starts(directory)) == 2, "it was not started again")
    ends = [attempt for attempt in directory.attempts() if attempt.event == "end"]
    assert [end.outcome for end in ends] == ["preempted"]
    assert starts(directory)[1].step == ends[0].step > 0  # saved at the signal, and continued from there
    logged = len(directory.metrics())
    until(lambda: len(directory.metrics()) > logged + 2, "it did not go on")
    os.kill(ranks()[1], signal.SIGKILL)
    wait_until_done(there)
    assert len(starts(directory)) == 3
    steps = [row.step for row in directory.metrics()]
    assert steps[-1] == run.spec.steps


def command_of(pid: int) -> bytes:
    """The command line of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
