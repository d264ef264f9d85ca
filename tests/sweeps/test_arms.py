"""Arms of another shape, arms that start from another arm's runs, and runs that share GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import ON_CPU, arm_table, campaign_head, rung_table

from scaling.errors import UserError
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.run.directory import RunDirectory
from scaling.spec import WarmStart
from sweeps.config.campaign import built_in, load_campaign
from sweeps.local import _LocalExecutor, run_local
from sweeps.planning.plan import CampaignPlan, plan
from sweeps.reporting.collect import collect
from sweeps.tuning.tuner import tune

CAMPAIGN = (
    campaign_head("arms")
    + arm_table("dense", "peak_lr = 1e-2", optimizer="muon")
    + arm_table(
        "upcycled",
        "peak_lr = 1e-3",
        'family = "mixtral-moe"',
        'moe = {{ num_experts = 4, top_k = 2, score = "topk-softmax", bias_update_rate = 0.0 }}',
        'warm_start = {{ arm = "{parent}", method = "upcycle", count_flops = {charged} }}',
        optimizer="muon",
    )
    + rung_table("a", tokens=2560)
    + ON_CPU
)


def planned(folder: Path, text: Path, *, parent: str = "dense", charged: str = "true") -> CampaignPlan:
    file = folder / "arms.toml"
    file.write_text(CAMPAIGN.format(text=text, parent=parent, charged=charged))
    return plan(load_campaign(file), folder)


def test_an_upcycled_arm_waits_and_is_charged(tiny_text: Path, tmp_path: Path) -> None:
    # Dearest first, two at a time: without the wait the upcycled run would start before the dense one is done.
    outcome = run_local(planned(tmp_path, tiny_text), workers=2, order="expensive", progress=False)
    assert outcome.complete
    records: dict[str, Any] = {}
    for run in outcome.plan.runs:
        records[run.arm] = RunDirectory(outcome.plan.directory(run).path).record()
    assert records["upcycled"].spec.warm_start == WarmStart(
        run=records["dense"].spec.id, method="upcycle", count_flops=True
    )
    assert records["upcycled"].initial_flops == records["dense"].flops
    assert records["upcycled"].validation_loss < records["dense"].validation_loss
    dense, upcycled = (row for _, row in collect(outcome.plan).iterrows())
    assert dense.seconds == records["dense"].seconds
    assert upcycled.seconds == pytest.approx(dense.seconds + records["upcycled"].seconds)
    assert upcycled.cpu_seconds == pytest.approx(dense.cpu_seconds + records["upcycled"].cpu_seconds)
    own = sum(run_optimizer_flops(record.spec) for record in records.values())
    assert upcycled.flops_with_optimizer - upcycled.flops == own > dense.flops_with_optimizer - dense.flops > 0


def test_charging_the_parent_changes_the_run_id(tiny_text: Path, tmp_path: Path) -> None:
    charged, free = (planned(tmp_path, tiny_text, charged=word).runs[1].id for word in ("true", "false"))
    assert charged != free


def test_an_arm_must_start_from_an_earlier_arm(tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'starts from arm "upcycled", and the arms before it are dense'):
        planned(tmp_path, tiny_text, parent="upcycled")


def test_trials_of_an_upcycled_arm_train_parents_first(tiny_text: Path, tmp_path: Path) -> None:
    file = tmp_path / "arms.toml"
    tables = CAMPAIGN.format(text=tiny_text, parent="dense", charged="true").replace("peak_lr = 1e-3", "tuned = true")
    search = (
        "[tune]\ntrials = 2\nstartup = 2\nin_flight = 2\nwiden = 0\n[tune.search.peak_lr]\nlow = 1e-3\nhigh = 1e-2\n"
    )
    file.write_text(tables + search)
    tuning = tune(load_campaign(file), tmp_path, progress=False)
    assert [trial.loss is not None for study in tuning.studies for trial in study.trials] == [True, True]
    made = plan(load_campaign(file), tmp_path)
    states = {run.arm: made.state(run) for run in made.runs}
    assert states == {"dense": "finished", "upcycled": "finished"}
    file.write_text(file.read_text().replace("peak_lr = 1e-2", "tuned = true"))
    with pytest.raises(UserError, match='starts from "dense", whose settings the same studies decide'):
        load_campaign(file)


@pytest.mark.parametrize("name", [name for name in built_in() if name in ("moe-small", "upcycled-small")])
def test_arms_of_a_mixture_campaign_see_the_same_tokens(name: str, tmp_path: Path) -> None:
    made = plan(load_campaign(name), tmp_path)
    for cell in {run.cell for run in made.runs}:
        runs = [run for run in made.runs if run.cell == cell]
        assert len({(run.spec.budget.tokens, run.spec.batch_tokens, run.spec.seed) for run in runs}) == 1
        assert len({run.spec.model.family for run in runs}) == 2


def test_runs_use_the_emptiest_gpu(tiny_text: Path, tmp_path: Path) -> None:
    made = planned(tmp_path, tiny_text)
    campaign = _LocalExecutor(made, [], "none")
    campaign.slots = ["0", "1", "0", "1"]
    given = []
    for number in range(5):
        run = made.runs[0].__class__(
            **{f: getattr(made.runs[0], f) for f in made.runs[0].__struct_fields__ if f != "id"}, id=str(number)
        )
        given.append(campaign._slot(run))
        campaign.active[run.id] = run
    assert given == ["0", "1", "0", "1", None]
