"""Campaigns of seconds, trained for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.campaign import load_campaign
from sweeps.plan import Plan, plan

CAMPAIGN = """
name = "tiny"
[data]
source = "text"
path = "{text}"
repeat = true
[model]
vocabulary = 256
context = 16
ffn_multiple = 8
[training]
batch_tokens = 128
[evaluation]
tokens = 512
times = 2
[[arms]]
name = "adamw"
optimizer = "adamw"
peak_lr = {peak_lr}
[[arms]]
name = "muon"
optimizer = "muon"
peak_lr = 2e-2
[[rungs]]
name = "a"
layers = 1
width = 16
heads = 2
tokens = 12_800
[[rungs]]
name = "b"
layers = 2
width = 16
heads = 2
tokens = {tokens}
[placement]
device = "cpu"
checkpoint_seconds = {checkpoint_seconds}
"""


class Campaigns:
    """Writes variants of the tiny campaign and plans them under a root of their own."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.text = text
        self.folder = folder

    def plan(
        self, root: str = "root", *, tokens: int = 25_600, peak_lr: float = 1e-2, checkpoint_seconds: float = 0.2
    ) -> Plan:
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
