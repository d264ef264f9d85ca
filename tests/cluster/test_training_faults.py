"""Faults in training itself, under SLURM: every run ends once, with the numbers of an undisturbed campaign."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import faulty_snapshot, numbers_of, real_plan, starts, wait_until_done
from waiting import until

from scaling.training.checkpoint import newest_checkpoint, step_of
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.reporting.status import status
from sweeps.slurm import submit
from sweeps.slurm.bad_nodes import bad_nodes
from sweeps.slurm.submit import submit_slurm

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_profile")]


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "take_snapshot", faulty_snapshot)


def order(plan: CampaignPlan, run: PlannedRun, fault: str, *, step: int) -> None:
    """Ask for a fault before anything is submitted."""
    directory = plan.directory(run)
    directory.create(run.spec, run.placement)
    (directory.path / f"fault-{fault}").write_text(str(step))


def test_a_kill_a_torn_line_and_a_truncated_checkpoint_leave_no_trace_in_the_numbers_and_a_poisoned_run_is_data(
    cluster: Cluster, local: CampaignPlan, tiny_text: Path, tmp_path: Path
) -> None:
    there = real_plan(tiny_text, tmp_path)
    killed, torn, truncated, poisoned = there.runs
    faults = {"killed": killed, "torn": torn, "truncated": truncated, "nan": poisoned}
    for fault, run in faults.items():
        order(there, run, fault, step=18)
    submit_slurm(there)
    wait_until_done(there)
    for run in (killed, torn, truncated):
        first, second = starts(there.directory(run))
        assert (first.step, second.step) == (0, 16 if run is truncated else 17)
        assert there.state(run) == "finished"
    assert there.state(poisoned) == "diverged"
    record = there.directory(poisoned).record()
    assert record is not None
    assert record.validation_loss is None
    assert "not finite" in (record.reason or "")
    assert len(submit_slurm(there).done) == 4  # a result like the others, and not tried again
    assert submit_slurm(there, retry="diverged").queued == [poisoned.id]
    wait_until_done(there)
    assert numbers_of(there) == numbers_of(local)


def test_a_disk_that_fills_before_a_checkpoint_costs_that_checkpoint_alone(
    cluster: Cluster, local: CampaignPlan, tiny_text: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "tmpfs", str(root)], check=False).returncode:
        pytest.skip("this machine mounts no file systems for tests")
    try:
        there = real_plan(tiny_text, tmp_path, slurm="time_minutes = 5\nmax_parallel = 1")
        for run in there.runs:
            order(there, run, "full", step=18)
        submit_slurm(there)
        until(lambda: (root / "filler").exists(), "the disk did not fill")
        until(lambda: not cluster.ask("squeue", "-h"), "the jobs did not end")
        struck = next(run for run in there.runs if starts(there.directory(run)))
        point = newest_checkpoint(there.directory(struck).checkpoints)
        assert point is not None
        assert step_of(point) == 17
        assert not list(there.directory(struck).checkpoints.glob(".*"))  # no half of a file
        assert there.directory(struck).record() is None
        (root / "filler").unlink()
        for run in there.runs:
            (there.directory(run).path / "fault-full").unlink(missing_ok=True)
        until(lambda: not any(row.state in ("running", "queued") for row in status(there)), "they count as running")
        again = submit_slurm(there, retry="failed")
        assert len(again.queued) == 4
        assert bad_nodes(root) == {}  # a full disk is no fault of the nodes
        wait_until_done(there)
        assert starts(there.directory(struck))[-1].step == step_of(point)
        assert numbers_of(there) == numbers_of(local)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
