"""The program of a job."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sweeps.planning.plan import CampaignPlan
from sweeps.slurm import array_records, exit_codes
from sweeps.slurm.array_records import ArrayRecord


def test_changed_code_is_not_run(ready: CampaignPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready.runs[0]
    ready.directory(run).create(run.spec, run.placement)
    array = ArrayRecord(token="0" * 12, name="tiny-0", runs=(run.id,), code="another code")
    array_records.save(ready.root, array)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "1"}
    command = [sys.executable, "-m", "sweeps.slurm.job", str(array_records.path_of(ready.root, array.token))]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == exit_codes.INVALID_RUN
    assert ready.state(run) == "failed"
    assert "submitted with another code" in (ready.directory(run).attempts()[-1].reason or "")
