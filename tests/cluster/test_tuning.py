"""Studies under SLURM: generations as arrays, and the trials of the local executor in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from tuned import CAMPAIGN, trial_outcomes

import sweeps.tuning.tuner
from scaling.run.directory import RunDirectory
from sweeps.config.campaign import load_campaign
from sweeps.tuning.tuner import tune

pytestmark = pytest.mark.cluster

TUNE = """
trials = 4
startup = 2
in_flight = 2
rungs = ["a"]
[tune.search.peak_lr]
low = 1e-3
high = 1e-1
"""


def test_slurm_and_local_trials_are_equal(
    cluster: Cluster, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profile.toml").write_text("")
    monkeypatch.setenv("SCALING_SLURM_PROFILE", str(tmp_path / "profile.toml"))
    monkeypatch.setattr(sweeps.tuning.tuner, "POLL_SECONDS", 0.3)
    file = tmp_path / "tiny-tuned.toml"
    file.write_text(
        CAMPAIGN.format(text=tiny_text, tune=TUNE) + "[placement.slurm]\ntime_minutes = 5\nmax_parallel = 2\n"
    )
    here = tune(load_campaign(file), tmp_path / "local", workers=1, progress=False)
    there = tune(load_campaign(file), tmp_path / "slurm", executor="slurm", progress=False)
    assert there.complete
    assert trial_outcomes(there) == trial_outcomes(here)
    for study in there.studies:
        for trial in study.trials:
            attempts = RunDirectory(tmp_path / "slurm" / "runs" / trial.run).attempts()
            assert [attempt.event for attempt in attempts] == ["start", "end"]
