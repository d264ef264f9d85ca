"""Selection of runs and the description of a submission."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import plan
from sweeps.reporting.plan_table import plan_totals
from sweeps.reporting.status import planned_gpu_hours
from sweeps.slurm.submit import submit_slurm


@pytest.mark.parametrize(("gpus", "tasks", "times"), [(1, 1, 1.0), (8, 8, 1.0), (8, 1, 8.0)])
def test_gpu_hours_do_not_depend_on_where_gpus_are_requested(
    gpus: int, tasks: int, times: float, no_profile: Path, tmp_path: Path
) -> None:
    alone = plan_totals(plan(load_campaign("moonlight"), tmp_path))["gpu_hours"]
    requested = {"gpus_per_node": gpus, "tasks_per_node": tasks}
    settings = tuple(f"placement.slurm.{name}={value}" for name, value in requested.items())
    in_campaign = plan(load_campaign("moonlight", settings=settings), tmp_path)
    no_profile.write_text("".join(f"{name} = {value}\n" for name, value in requested.items()))
    in_profile = plan(load_campaign("moonlight"), tmp_path)
    for planned in (in_campaign, in_profile):
        submission = submit_slurm(planned, dry_run=True)
        hours = (plan_totals(planned)["gpu_hours"], submission.gpu_hours, planned_gpu_hours(planned))
        assert hours == pytest.approx([times * alone] * 3)
        assert ("stay idle" in submission.requests()[0]) == (times > 1)


def test_requests_show_resources_and_attempts(no_profile: Path, tmp_path: Path) -> None:
    def request(*settings: str) -> str:
        submission = submit_slurm(plan(load_campaign("moonlight", settings=settings), tmp_path), dry_run=True)
        return submission.requests()[0]

    assert "gpus_per_node = 1, tasks_per_node = 1, cpus_per_task = 8" in request()
    assert re.search(r"takes 350 h, so about 36\d jobs.* Raise time_minutes", request())
    assert "Raise time_minutes" not in request("placement.slurm.time_minutes=2880")
    assert "the job requests none" in request("placement.slurm.gpus_per_node=0")


def test_runs_share_a_device_or_devices_share_a_run(campaigns: Any, no_profile: Path) -> None:
    campaigns.plan()
    file = campaigns.folder / "tiny.toml"
    content = file.read_text()
    file.write_text(content + "runs_per_gpu = 2\n[placement.slurm]\ngpus_per_node = 1\n")
    submission = submit_slurm(plan(load_campaign(file), campaigns.folder / "root"), dry_run=True)
    assert "#SBATCH --array=0-1%2" in submission.scripts()[0]
    file.write_text(content + "runs_per_gpu = 2\n[placement.slurm]\ntasks_per_node = 2\n")
    with pytest.raises(UserError, match="set runs_per_gpu = 1, or nodes, tasks_per_node and devices = 1"):
        submit_slurm(plan(load_campaign(file), campaigns.folder / "root"), dry_run=True)
