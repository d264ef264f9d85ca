"""Operations on a cluster and on submitted runs: doctor, cancel, logs, clean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster import Cluster
from conftest import Counting, assert_finished_once, wait_for_steps, wait_until_done
from waiting import until

from scaling.errors import UserError
from sweeps.planning.run_operations import clean, select, show_log
from sweeps.reporting.status import status
from sweeps.slurm import SlurmExecutor
from sweeps.slurm.doctor import ClusterCheck, examine

pytestmark = pytest.mark.cluster


def verdicts(checks: list[ClusterCheck]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_doctor_passes_a_good_placement(cluster: Cluster, counting: Counting) -> None:
    found = verdicts(examine(counting.plan(slurm="time_minutes = 5\ngpus_per_node = 2")))
    assert found.pop("run root") in ("warn", "pass")
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ('partition = "mian"', 'no partition "mian"'),
        ("time_minutes = 500", "allows 120; the job would never start"),
        ("gpus_per_node = 99", "SLURM would refuse"),
        ("nodes = 7", "SLURM would refuse"),
        ("time_minutes = 1\nsignal_seconds = 60", "is the whole job"),
    ],
)
def test_doctor_fails_a_job_that_cannot_start(cluster: Cluster, counting: Counting, slurm: str, expected: str) -> None:
    (failed,) = [check for check in examine(counting.plan(slurm=slurm)) if check.verdict == "fail"]
    assert expected in failed.finding


def test_doctor_probes_a_node(cluster: Cluster, counting: Counting) -> None:
    probe = examine(counting.plan(slurm="time_minutes = 5"), probe=True)[-1]
    assert (probe.name, probe.verdict) == ("probe of a", "pass"), probe.finding
    assert not list((counting.folder / "root" / "submissions").glob(".probe*"))


def test_cancelling_an_arm_leaves_the_other_alone(cluster: Cluster, counting: Counting) -> None:
    planned = counting.plan(steps=60)
    counting.submit(planned)
    wait_for_steps(planned, *planned.runs, step=3)
    muon = select(planned, arm="muon")
    assert len(SlurmExecutor(planned).cancel(muon)) == 2
    until(lambda: [row.state for row in status(planned) if row.arm == "adamw"] == ["finished"] * 2, "not finished")
    until(lambda: not cluster.run("squeue", "-h"), "the cancelled jobs did not end")
    # The accounting reports RUNNING for some seconds after the queue has forgotten a job.
    cancelled = sorted(run.id for run in muon)
    until(lambda: sorted(counting.submit(planned).cancelled) == cancelled, "the cancelled runs do not say so")
    assert len(counting.submit(planned, retry="cancelled").queued) == 2
    wait_until_done(planned)
    assert_finished_once(planned, redone=0)


def test_logs_are_shown_and_finished_runs_are_cleaned(
    cluster: Cluster, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = counting.plan(steps=30)
    finished, other = planned.runs[0], planned.runs[1]
    with pytest.raises(UserError, match="printed nothing yet"):
        show_log(planned.directory(finished))
    counting.submit(planned)
    wait_until_done(planned)
    printed: list[str] = []
    write: Callable[[str], object] = printed.append
    show_log(planned.directory(finished), write=write)
    assert "restart 0, on node" in "".join(printed)
    planned.directory(other).record_file.rename(planned.directory(other).path / "hidden")  # as if it were not done
    files, size = clean(planned, [finished, other], dry_run=True)
    assert files
    assert size == sum(file.stat().st_size for file in files)
    assert all(file.is_relative_to(planned.directory(finished).path) for file in files)
    clean(planned, [finished, other], dry_run=False)
    assert not list(planned.directory(finished).checkpoints.glob("*.ckpt"))
    assert list(planned.directory(other).checkpoints.glob("*.ckpt"))
    assert planned.directory(finished).record_file.exists()


def test_a_run_that_is_not_in_the_plan_is_not_selected(counting: Counting) -> None:
    planned = counting.plan()
    with pytest.raises(UserError, match='did you mean "muon"'):
        select(planned, arm="moun")
    with pytest.raises(UserError, match="no run of this plan begins"):
        select(planned, run="zzz")
    with pytest.raises(UserError, match="4 runs of this plan begin"):
        select(planned, run="")
