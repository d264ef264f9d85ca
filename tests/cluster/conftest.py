"""A SLURM for the session, and campaigns whose runs count instead of training (`counting_train`)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, port_is_open, until, why_not
from tiny import BOTH_ARMS, ON_CPU, campaign_head, rung_table

from scaling.records import Attempt, RunDirectory
from sweeps import arrays, snapshot, submit
from sweeps.campaign import load_campaign
from sweeps.collect import collect
from sweeps.plan import Plan, PlannedRun, plan, with_data
from sweeps.status import RunStatus, status

CAMPAIGN = (
    campaign_head("count", evaluation="")
    + BOTH_ARMS
    + rung_table("a", tokens="{tokens}")
    + rung_table("b", layers=2, tokens="{tokens}")
    + ON_CPU
    + "checkpoint_seconds = {step_seconds}\n[placement.slurm]\n{slurm}\n"
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with accounting; a machine that cannot have them skips, but never in CI."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="scs-", dir="/tmp"))
    before = os.environ.get("SLURM_CONF")
    with Path("/tmp/.scaling-slurm.lock").open("w") as lock:
        # Test processes side by side have a cluster each, and choose packages and ports one after the other.
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = next(base for base in range(17600, 19600, 50) if not any(map(port_is_open, range(base, base + 20))))
        running = Cluster(folder, name=f"testing{os.getpid()}", port=port)
        os.environ["SLURM_CONF"] = running.environment["SLURM_CONF"]
        try:
            running.start()
        except BaseException:
            running.stop()
            raise
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test finds all daemons up and the queue empty."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.start()
        cluster.ask("scancel", "--me", check=False)
        try:
            until(lambda: not cluster.ask("squeue", "-h"), 10, "the queue did not become empty")
        except TimeoutError:  # a controller that was killed can leave jobs completing for minutes
            cluster.stop()
            shutil.rmtree(cluster.folder / "state")
            cluster.start()


def counting_snapshot(folder: Path) -> Path:
    """A code snapshot whose runs count."""
    target = folder / "counting"
    if not target.exists():
        for file in snapshot._files(snapshot.code_root()):
            copy = target / file.relative_to(snapshot.code_root())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        shutil.copyfile(Path(__file__).with_name("counting_train.py"), target / "scaling" / "train.py")
    return target


class Counting:
    """Plans, submits and checks counting campaigns under one root."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.text = text
        self.folder = folder

    def plan(self, *, steps: int = 40, step_seconds: float = 0.05, slurm: str = "minutes = 5") -> Plan:
        """Four runs: two rungs, two arms."""
        file = self.folder / "count.toml"
        values = {"text": self.text, "tokens": steps * 128, "step_seconds": step_seconds, "slurm": slurm}
        file.write_text(CAMPAIGN.format(**values))
        return with_data(plan(load_campaign(file), self.folder / "root"), progress=False)

    def submit(self, planned: Plan, **options: Any) -> submit.Submission:
        """`submit_slurm` with the counting snapshot."""
        return submit.submit_slurm(planned, **options)


@pytest.fixture
def counting(tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """See `Counting`."""
    monkeypatch.setattr(submit, "take_snapshot", counting_snapshot)
    monkeypatch.setenv("SCALING_SLURM_PROFILE", str(tmp_path / "profile.toml"))
    (tmp_path / "profile.toml").write_text("")
    return Counting(tiny_text, tmp_path)


def expected(run: PlannedRun) -> float:
    """The loss that an undisturbed run ends with."""
    value = hashlib.sha256(run.id.encode()).hexdigest()
    for step in range(run.spec.steps):
        value = hashlib.sha256(f"{value} {step}".encode()).hexdigest()
    return int(value[:8], 16) / 16**8


def assert_finished_once(planned: Plan, *, redone: int | None = None) -> None:
    """Every run finished with an undisturbed run's numbers; at most `redone` steps were taken twice."""
    table = collect(planned)
    assert list(table["status"]) == ["finished"] * len(planned.runs), table[["cell", "status", "reason"]]
    assert list(table["loss"]) == [expected(run) for run in planned.runs]
    for run in planned.runs:
        ends = [attempt for attempt in planned.directory(run).attempts() if attempt.event == "end"]
        assert sum(end.outcome == "finished" for end in ends) == 1
        if redone is not None:
            steps = [row.step for row in planned.directory(run).metrics()]
            assert len(steps) - len(set(steps)) <= redone


def wait_until_done(planned: Plan, *, seconds: float = 90.0) -> None:
    """Until every run has a record."""
    try:
        until(lambda: all(planned.directory(run).record_file.exists() for run in planned.runs), seconds, "not done")
    except TimeoutError:
        raise TimeoutError([(row.cell, row.arm, row.state, row.step, row.reason) for row in status(planned)]) from None


def of(planned: Plan, run: PlannedRun) -> RunStatus:
    """The run's row of `status`."""
    return next(row for row in status(planned) if row.run == run.id)


def under_way(planned: Plan, run: PlannedRun, *, step: int = 1) -> bool:
    """Whether the run has taken so many steps and is not done."""
    directory = planned.directory(run)
    return len(directory.metrics()) >= step and not directory.record_file.exists()


def starts(directory: RunDirectory) -> list[Attempt]:
    """The run's attempts."""
    return [attempt for attempt in directory.attempts() if attempt.event == "start"]


def task_of(planned: Plan, run: PlannedRun) -> str:
    """SLURM's id of the run's job."""
    job = arrays.locations(arrays.all_arrays(planned.root))[run.id].job
    assert job is not None
    return job


def wait_for_steps(planned: Plan, *runs: PlannedRun, step: int = 1) -> None:
    """Until the runs have taken so many steps."""
    until(lambda: all(under_way(planned, run, step=step) for run in runs), 60, "the runs did not start")
    time.sleep(0.01)
