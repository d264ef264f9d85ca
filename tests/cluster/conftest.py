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

from cluster import Cluster, port_is_open, why_not
from tiny import BOTH_ARMS, ON_CPU, campaign_head, rung_table
from waiting import until

from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt
from sweeps.config.campaign import load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import CampaignPlan, PlannedRun, plan, with_data
from sweeps.planning.run_state import RunStatus
from sweeps.reporting.collect import collect
from sweeps.reporting.status import status
from sweeps.slurm import array_records, sbatch
from sweeps.slurm.select_runs import Submission
from sweeps.slurm.submit import submit_slurm

CAMPAIGN = (
    campaign_head("count", evaluation="")
    + BOTH_ARMS
    + rung_table("a", tokens="{tokens}")
    + rung_table("b", layers=2, tokens="{tokens}")
    + ON_CPU
    + "checkpoint_seconds = {step_seconds}\nruns_per_gpu = {runs_per_gpu}\n[placement.slurm]\n{slurm}\n"
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
        cluster.run("scancel", "--me", check=False)
        try:
            until(lambda: not cluster.run("squeue", "-h"), "the queue did not become empty", quiet_samples=10)
        except TimeoutError:  # a controller that was killed can leave jobs completing for minutes
            cluster.lose_state()


def copied_code(folder: Path, train: str) -> Path:
    """A code snapshot with another scaling/training/loop.py; the real one is beside it."""
    target = folder / train
    if not target.exists():
        for file in sbatch.code_files(sbatch.code_root()):
            copy = target / file.relative_to(sbatch.code_root())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        (target / "scaling" / "training" / "loop.py").rename(target / "scaling" / "true_train.py")
        shutil.copyfile(Path(__file__).with_name(f"{train}.py"), target / "scaling" / "training" / "loop.py")
    return target


def counting_snapshot(folder: Path) -> Path:
    """A code snapshot whose runs count."""
    return copied_code(folder, "counting_train")


def faulty_snapshot(folder: Path) -> Path:
    """A code snapshot whose runs train, and suffer the faults that a test requests."""
    return copied_code(folder, "faulty_train")


def four_runs(
    text: Path, folder: Path, *, steps: int, step_seconds: float, slurm: str, runs_per_gpu: int = 1
) -> CampaignPlan:
    """Two rungs, two arms, planned under ``folder/root``."""
    file = folder / "count.toml"
    values = {"text": text, "tokens": steps * 128, "step_seconds": step_seconds}
    file.write_text(CAMPAIGN.format(**values, slurm=slurm, runs_per_gpu=runs_per_gpu))
    return with_data(plan(load_campaign(file), folder / "root"), progress=False)


def real_plan(
    text: Path,
    folder: Path,
    *,
    slurm: str = "time_minutes = 5",
    steps: int = 24,
    every: float = 0.0,
    runs_per_gpu: int = 1,
) -> CampaignPlan:
    """Four runs that train, and save their state after every step or every so many seconds."""
    return four_runs(text, folder, steps=steps, step_seconds=every, slurm=slurm, runs_per_gpu=runs_per_gpu)


def numbers_of(planned: CampaignPlan) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Results, and curves without their clocks: equal digit for digit after any fault."""
    table = collect(planned)
    columns = ["arm", "cell", "run", "status", "params", "tokens", "flops", "flops_attention", "loss", "train_loss"]
    curves = [
        (run.id, row.step, row.tokens, row.train_loss, row.validation_loss, row.grad_norm, row.learning_rate)
        for run in planned.runs
        for row in planned.directory(run).metrics()
    ]
    return [tuple(row) for row in table[columns].to_numpy()], curves


@pytest.fixture(scope="session")
def local(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> CampaignPlan:
    """`real_plan` as the local executor trains it, undisturbed."""
    outcome = run_local(real_plan(tiny_text, tmp_path_factory.mktemp("local")), workers=2, progress=False)
    assert outcome.complete
    return outcome.plan


@pytest.fixture
def no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty profile of the user."""
    file = tmp_path / "profile.toml"
    file.write_text("")
    monkeypatch.setenv("SCALING_SLURM_PROFILE", str(file))
    return file


class Counting:
    """Plans, submits and checks counting campaigns under one root."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.text = text
        self.folder = folder

    def plan(
        self, *, steps: int = 40, step_seconds: float = 0.05, slurm: str = "time_minutes = 5", runs_per_gpu: int = 1
    ) -> CampaignPlan:
        """Four runs: two rungs, two arms."""
        return four_runs(
            self.text, self.folder, steps=steps, step_seconds=step_seconds, slurm=slurm, runs_per_gpu=runs_per_gpu
        )

    def submit(self, planned: CampaignPlan, **options: Any) -> Submission:
        """`submit_slurm` with the counting snapshot."""
        return submit_slurm(planned, **options)


@pytest.fixture
def counting(tiny_text: Path, tmp_path: Path, no_profile: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """See `Counting`."""
    monkeypatch.setattr(sbatch, "take_snapshot", counting_snapshot)
    return Counting(tiny_text, tmp_path)


def expected(run: PlannedRun) -> float:
    """The loss that an undisturbed run ends with."""
    value = hashlib.sha256(run.id.encode()).hexdigest()
    for step in range(run.spec.steps):
        value = hashlib.sha256(f"{value} {step}".encode()).hexdigest()
    return int(value[:8], 16) / 16**8


def assert_finished_once(planned: CampaignPlan, *, redone: int | None = None) -> None:
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


def wait_until_done(planned: CampaignPlan) -> None:
    """Until every run has a record."""
    try:
        until(lambda: all(planned.directory(run).record_file.exists() for run in planned.runs), "not done")
    except TimeoutError:
        raise TimeoutError([(row.cell, row.arm, row.state, row.step, row.reason) for row in status(planned)]) from None


def row_of(planned: CampaignPlan, run: PlannedRun) -> RunStatus:
    """The run's row of `status`."""
    return next(row for row in status(planned) if row.run == run.id)


def under_way(planned: CampaignPlan, run: PlannedRun, *, step: int = 1) -> bool:
    """True if the run has taken so many steps and is not done."""
    directory = planned.directory(run)
    return len(directory.metrics()) >= step and not directory.record_file.exists()


def starts(directory: RunDirectory) -> list[Attempt]:
    """The run's attempts."""
    return [attempt for attempt in directory.attempts() if attempt.event == "start"]


def task_of(planned: CampaignPlan, run: PlannedRun) -> str:
    """SLURM's id of the run's job."""
    job = array_records.locations(array_records.all_arrays(planned.root))[run.id].job
    assert job is not None
    return job


def wait_for_steps(planned: CampaignPlan, *runs: PlannedRun, step: int = 1) -> None:
    """Until the runs have taken so many steps."""
    until(lambda: all(under_way(planned, run, step=step) for run in runs), "the runs did not start")
    time.sleep(0.01)
