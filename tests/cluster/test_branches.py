"""Runs that start from other runs: submitted in one call, begun when what they start from is there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from cluster import Cluster
from conftest import Counting, assert_finished_once, numbers_of, row_of, starts, wait_until_done
from tiny import BOTH_ARMS, ON_CPU, campaign_head, rung_table
from waiting import until

from sweeps.config.campaign import load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.slurm.submit import submit_slurm

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_profile")]

CAMPAIGN = (
    campaign_head("branched")
    + '[schedule]\nkind = "wsd"\nwarmup = 0.1\ndecay = 0.2\nbranches = true\n'
    + BOTH_ARMS
    + rung_table("a-20", tokens=2_560)
    + rung_table("a-80", tokens=10_240)
    + ON_CPU
)


def branched(text: Path, folder: Path) -> CampaignPlan:
    """A trunk and a branch of it for each arm."""
    folder.mkdir()
    file = folder / "branched.toml"
    file.write_text(CAMPAIGN.format(text=text))
    return with_data(plan(load_campaign(file), folder / "root"), progress=False)


def test_branches_wait_for_trunks_and_train_only_decays(cluster: Cluster, tiny_text: Path, tmp_path: Path) -> None:
    here = run_local(branched(tiny_text, tmp_path / "here"), workers=2, progress=False).plan
    there = branched(tiny_text, tmp_path / "there")
    assert len(submit_slurm(there).queued) == 4
    wait_until_done(there)
    for run in there.runs:
        begun = [attempt.step for attempt in starts(there.directory(run))]
        assert begun == [run.spec.branch_tokens // run.spec.batch_tokens if run.spec.branch_of else 0]
    assert numbers_of(there) == numbers_of(here)


def test_a_failed_trunk_takes_down_its_own_branch_alone(cluster: Cluster, counting: Counting) -> None:
    requested = counting.plan(steps=20)
    trunk, other, *ends = requested.runs
    specs = [
        msgspec.structs.replace(end.spec, branch_of=start.id) for end, start in zip(ends, (trunk, other), strict=True)
    ]
    branch, second = (
        msgspec.structs.replace(end, id=spec.id, spec=spec) for end, spec in zip(ends, specs, strict=True)
    )
    planned = msgspec.structs.replace(requested, runs=(trunk, other, branch, second))
    planned.directory(trunk).create(trunk.spec, trunk.placement)
    (planned.directory(trunk).path / "fault-raise").write_text("3")
    assert len(counting.submit(planned).queued) == 4
    until(lambda: row_of(planned, trunk).state == "failed", "the trunk did not fail")
    until(lambda: row_of(planned, second).state == "finished", "the other branch did not finish")
    until(lambda: row_of(planned, branch).state == "preempted", "the branch still waits")
    assert "ended badly" in (row_of(planned, branch).reason or "")
    again = counting.submit(planned)
    assert (again.failed, again.rejected, again.cancelled) == ([trunk.id], [branch.id], [])
    (planned.directory(trunk).path / "fault-raise").unlink()
    assert counting.submit(planned, retry="failed").queued == [trunk.id, branch.id]
    wait_until_done(planned)
    assert_finished_once(planned)
    assert starts(planned.directory(branch))[0].time > starts(planned.directory(trunk))[-1].time
