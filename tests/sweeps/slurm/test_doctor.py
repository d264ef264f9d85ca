"""Checks of a cluster with fake SLURM commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeps.config.placement import SlurmConfig
from sweeps.slurm import doctor
from sweeps.slurm.submit import submit_slurm


@pytest.mark.parametrize(
    ("association", "verdict", "expected"),
    [
        ("|cpu=1|||", "fail", "account lab may use 1 of cpu, and a job requests 2"),
        ("me||gres/gpu=4,cpu=9||", "pass", ""),
        ("me|||0|", "fail", "account lab may have no running jobs"),
        ("other|cpu=1|||", "pass", ""),
    ],
)
def test_a_job_above_a_limit_fails(commands: Any, association: str, verdict: str, expected: str) -> None:
    commands(
        id="echo me",
        sacctmgr=f"[[ $* == *association* ]] && echo '{association}' || echo lab",
        scontrol="echo 'PartitionName=main Default=YES MaxTime=UNLIMITED'",
        sbatch="exit 0",
    )
    found, finding = doctor._placement(SlurmConfig(cpus_per_task=2))
    assert found == verdict
    assert expected in finding


def test_doctor_and_submit_pass_the_same_options(campaigns: Any, commands: Any, no_profile: Path) -> None:
    no_profile.write_text('partition = "main"\nqos = "long"\n[sbatch]\nreservation = "lab"\nexclusive = true\n')
    commands(scontrol="echo 'PartitionName=main MaxTime=UNLIMITED'", sbatch='echo "$@" > $(dirname $0)/arguments')
    plan = campaigns.plan()
    assert doctor._placement(plan.placements["a"].slurm)[0] == "pass"
    passed = set((commands.folder / "arguments").read_text().split()) - {"--test-only", "--wrap", "true"}
    (script,) = submit_slurm(plan, dry_run=True).scripts()
    submitted = {line.removeprefix("#SBATCH ") for line in script.splitlines()}
    assert {"--partition=main", "--qos=long", "--reservation=lab", "--exclusive"} <= passed <= submitted
