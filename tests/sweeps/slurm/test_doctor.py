"""Checks of a cluster with fake SLURM commands."""

from __future__ import annotations

from typing import Any

import pytest

from sweeps.config.placement import SlurmConfig
from sweeps.slurm import doctor


@pytest.mark.parametrize(
    ("association", "verdict", "said"),
    [
        ("|cpu=1|||", "fail", "account lab may use 1 of cpu, and a job requests 2"),
        ("me||gres/gpu=4,cpu=9||", "pass", ""),
        ("me|||0|", "fail", "account lab may have no running jobs"),
        ("somebody|cpu=1|||", "pass", ""),
    ],
)
def test_a_job_above_a_limit_fails(commands: Any, association: str, verdict: str, said: str) -> None:
    commands(
        id="echo me",
        sacctmgr=f"[[ $* == *association* ]] && echo '{association}' || echo lab",
        scontrol="echo 'PartitionName=main Default=YES MaxTime=UNLIMITED'",
        sbatch="exit 0",
    )
    check = doctor._placement("a", SlurmConfig(cpus_per_task=2))
    assert check.verdict == verdict
    assert said in check.finding
