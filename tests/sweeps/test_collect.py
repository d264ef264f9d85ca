"""Collected tables: FLOPs with the optimizer's own, measured dynamics, and protection of other campaigns' results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from recorded import write_record

from scaling.errors import UserError
from scaling.io import append_line
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.run.record import DynamicsRow
from sweeps.config.campaign import load_campaign, refuse_other
from sweeps.planning.plan import CampaignPlan, plan
from sweeps.reporting.collect import DYNAMICS_COLUMNS, collect
from tests.sweeps.conftest import Campaigns


def test_optimizer_flops_have_their_own_columns(campaigns: Campaigns, tmp_path: Path) -> None:
    plan = campaigns.plan()
    write_record(plan.directory(plan.runs[-1]), plan.runs[-1].spec, 3.0)
    runs = collect(plan, tmp_path / "results").set_index("run")
    for run in plan.runs:  # planned or finished
        row, own = runs.loc[run.id], run_optimizer_flops(run.spec)
        assert (own == 0) == (run.arm == "adamw")
        assert row.flops_with_optimizer - row.flops == row.flops_attention_with_optimizer - row.flops_attention == own
    assert not (tmp_path / "results" / "dynamics.parquet").exists()


def test_dynamics_have_one_row_per_number(campaigns: Campaigns, tmp_path: Path) -> None:
    plan = campaigns.plan()
    run = plan.runs[1]
    file = plan.directory(run).dynamics_file
    file.parent.mkdir(parents=True, exist_ok=True)
    for step, size in [(4, 0.15), (8, 0.1), (8, 0.2)]:  # a run that continued measured step 8 again
        append_line(file, DynamicsRow(
            step=step, tokens=step * 128, update_rms={"attention.query": size, "norm": 0.3},
            largest_logit={"blocks.0.attention": 7.0}, svd_entropy={"attention.query": 0.9}, clipped_heads=step,
        ))  # fmt: skip
    collect(plan, tmp_path / "results")
    table = pd.read_parquet(tmp_path / "results" / "dynamics.parquet")
    assert list(table.columns) == list(DYNAMICS_COLUMNS)
    assert set(table.run) == {run.id}
    sizes = table[(table.quantity == "update_rms") & (table.part == "attention.query")]
    assert list(sizes.step) == [4, 8]
    assert list(sizes.value) == [0.15, 0.2]
    assert set(table.quantity) == {"update_rms", "largest_logit", "svd_entropy", "clipped_heads"}


def finish(plan: CampaignPlan) -> CampaignPlan:
    for run in plan.runs:
        write_record(plan.directory(run), run.spec, 3.0)
    return plan


def test_results_of_another_campaign_are_not_replaced(campaigns: Campaigns) -> None:
    first = finish(campaigns.plan())
    collect(first)
    kept = (first.results / "runs.csv").read_bytes()
    other = finish(campaigns.plan(peak_lr=2e-2))
    with pytest.raises(UserError, match=r"2 of them are not runs of tiny.toml.*--set name=tiny-2.*--overwrite"):
        collect(other)
    with pytest.raises(UserError, match=r"collected from tiny\.toml with another content"):
        refuse_other(other.results, other.campaign)
    assert (first.results / "runs.csv").read_bytes() == kept
    refuse_other(first.results, first.campaign)
    collect(other, overwrite=True)
    refuse_other(other.results, other.campaign)


def test_an_extended_campaign_replaces_its_tables(campaigns: Campaigns) -> None:
    first = finish(campaigns.plan())
    collect(first)
    file = campaigns.folder / "tiny.toml"
    grown = plan(load_campaign(file, settings=("seeds=[0, 1]",)), first.root)
    assert len(collect(grown)) == 8
    placed = plan(load_campaign(file, settings=("seeds=[0, 1]", "placement.threads=2", "title=another")), first.root)
    assert placed.campaign.identity == grown.campaign.identity
    with pytest.raises(UserError, match="not runs of"):
        collect(finish(first) and plan(load_campaign(file, settings=("seeds=[1]",)), first.root))
