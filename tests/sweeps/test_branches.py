"""Campaigns of trunk and branches: branch points in the plan, and saved FLOPs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import ON_CPU, arm_table, campaign_head, rung_table

from scaling.errors import UserError
from scaling.flops import train_flops
from scaling.run.directory import RunDirectory
from sweeps.config.campaign import load_campaign
from sweeps.local import run_local
from sweeps.planning.branches import saved_flops
from sweeps.planning.plan import CampaignPlan, plan

CAMPAIGN = (
    campaign_head("branched", training="peak_lr = 1e-2")
    + '[schedule]\nkind = "{kind}"\nwarmup = 0.1\n{schedule}\n'
    + arm_table("adamw")
    + arm_table("muon")
    + rung_table("a-20", tokens=2_560)
    + rung_table("a-40", tokens=5_120)
    + rung_table("a-80", tokens=10_240)
    + rung_table("b", layers=2, tokens=2_560)
    + ON_CPU
)


def planned(
    text: Path, folder: Path, *, kind: str = "wsd", schedule: str = "decay = 0.2\nbranches = true"
) -> CampaignPlan:
    file = folder / "branched.toml"
    file.write_text(CAMPAIGN.format(text=text, kind=kind, schedule=schedule))
    return plan(load_campaign(file), folder / "root")


def test_shorter_budgets_branch_off_the_longest(tiny_text: Path, tmp_path: Path) -> None:
    made = planned(tiny_text, tmp_path)
    runs = {(run.arm, run.rung): run for run in made.runs}
    for arm in ("adamw", "muon"):
        trunk = runs[arm, "a-80"]
        assert trunk.spec.branch_of is None
        assert trunk.placement.keep_tokens == (16 * 128, 32 * 128)  # four fifths of 20 and of 40 steps
        assert {runs[arm, rung].spec.branch_of for rung in ("a-20", "a-40")} == {trunk.id}
        assert runs[arm, "b"].spec.branch_of is None
        # One warm-up for all: a tenth of the shortest.
        assert {runs[arm, rung].spec.schedule.warmup_tokens for rung in ("a-20", "a-40", "a-80")} == {256}
    shape = runs["adamw", "a-20"].spec.model
    assert saved_flops(made) == 2 * train_flops(shape, (16 + 32) * 128)


def test_branches_train_only_their_decays(tiny_text: Path, tmp_path: Path) -> None:
    made = planned(tiny_text, tmp_path)
    made = run_local(made, workers=2, progress=False).plan
    for run in made.runs:
        starts = [a.step for a in RunDirectory(made.directory(run).path).attempts() if a.event == "start"]
        expected = run.spec.branch_tokens // run.spec.batch_tokens if run.spec.branch_of else 0
        assert starts == [expected], (run.arm, run.rung)
        assert made.state(run) == "finished"


def test_branches_without_a_stable_phase_are_refused(tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='branches need kind = "wsd"; "cosine" has no trunk'):
        planned(tiny_text, tmp_path, kind="cosine", schedule="branches = true")
