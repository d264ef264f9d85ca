"""Campaigns of seconds, trained for real."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import ON_CPU, arm_table, campaign_head, rung_table
from tuned import Load, loader

from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import CampaignPlan, plan

CAMPAIGN = (
    campaign_head("tiny", evaluation="times = 2")
    + arm_table("adamw", "peak_lr = {peak_lr}")
    + arm_table("muon", "peak_lr = 2e-2")
    + rung_table("a", tokens=12_800)
    + rung_table("b", layers=2, tokens="{tokens}")
    + ON_CPU
    + "checkpoint_seconds = {checkpoint_seconds}\n"
)


class Campaigns:
    """Writes variants of the tiny campaign and plans them under a root of their own."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.text = text
        self.folder = folder

    def plan(
        self, root: str = "root", *, tokens: int = 25_600, peak_lr: float = 1e-2, checkpoint_seconds: float = 0.2
    ) -> CampaignPlan:
        """The plan of two rungs and two arms."""
        file = self.folder / "tiny.toml"
        file.write_text(
            CAMPAIGN.format(text=self.text, tokens=tokens, peak_lr=peak_lr, checkpoint_seconds=checkpoint_seconds)
        )
        return plan(load_campaign(file), self.folder / root)


@pytest.fixture
def campaigns(tiny_text: Path, tmp_path: Path) -> Campaigns:
    """See `Campaigns`."""
    return Campaigns(tiny_text, tmp_path)


@pytest.fixture
def campaign(tiny_text: Path, tmp_path: Path) -> Load:
    """Variants of the tiny campaign with two tuned arms."""
    return loader(tiny_text, tmp_path)
