"""Real training under SLURM: the numbers of the local executor, on one task, several tasks, and several nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster
from conftest import CAMPAIGN, wait_until_done
from safetensors.numpy import load_file

from sweeps.campaign import load_campaign
from sweeps.collect import collect
from sweeps.dispatch import run_local
from sweeps.plan import Plan, plan, with_data
from sweeps.submit import submit_slurm

pytestmark = pytest.mark.cluster


def planned(text: Path, folder: Path, root: str, *, slurm: str = "minutes = 5") -> Plan:
    """Four runs of a second."""
    file = folder / "real.toml"
    file.write_text(CAMPAIGN.format(text=text, tokens=24 * 128, step_seconds=30.0, slurm=slurm))
    return with_data(plan(load_campaign(file), folder / root), progress=False)


@pytest.fixture(scope="module")
def local(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The campaign as the local executor trains it."""
    outcome = run_local(planned(tiny_text, tmp_path_factory.mktemp("local"), "root"), workers=1, progress=False)
    assert outcome.complete
    return outcome.plan


@pytest.fixture(autouse=True)
def no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profile.toml").write_text("")
    monkeypatch.setenv("SCALING_SLURM_PROFILE", str(tmp_path / "profile.toml"))


def test_slurm_and_the_local_executor_give_the_same_table(
    cluster: Cluster, local: Plan, tiny_text: Path, tmp_path: Path
) -> None:
    there = planned(tiny_text, tmp_path, "slurm", slurm="minutes = 5\nparallel = 2")
    submit_slurm(there)
    wait_until_done(there, seconds=180)
    columns = ["arm", "cell", "run", "status", "params", "tokens", "flops", "flops_attention", "loss", "train_loss"]
    assert collect(there)[columns].equals(collect(local)[columns])


@pytest.mark.parametrize("slurm", ["tasks = 2", "nodes = 2"])
def test_several_tasks_train_to_the_weights_of_one(
    cluster: Cluster, local: Plan, tiny_text: Path, tmp_path: Path, slurm: str
) -> None:
    there = planned(tiny_text, tmp_path, "slurm", slurm=f"minutes = 5\nparallel = 1\n{slurm}")
    keep = tuple(run for run in there.runs if run.rung == "a" and run.arm == "muon")
    there = type(there)(**{name: getattr(there, name) for name in there.__struct_fields__} | {"runs": keep})
    assert len(submit_slurm(there).queued) == 1
    wait_until_done(there, seconds=180)
    record, alone = there.directory(keep[0]).record(), local.directory(keep[0]).record()
    assert record is not None
    assert alone is not None
    # The gradients of two halves are added in another order than those of the whole: rounding, and nothing else.
    assert record.validation_loss == pytest.approx(alone.validation_loss, rel=1e-5)
    weights, expected = (load_file(p.directory(keep[0]).weights_file) for p in (there, local))
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
