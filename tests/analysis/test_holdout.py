"""Predictions made without the largest rung, and their scores."""

import numpy as np
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.ratio.moonlight import moonlight_table
from analysis.single_arm.holdout import hold_out, holdout_text
from scaling.errors import UserError


def test_a_law_predicts_its_own_largest_run() -> None:
    found = hold_out(ladder({"adamw": ADAMW, "muon": MUON}))
    assert {p.arm for p in found.predictions} == {"adamw", "muon"}
    assert all(abs(p.error) < 1e-6 for p in found.predictions if p.form == "power")


def test_moonlights_largest_runs_are_worse_than_predicted() -> None:
    found = [p for p in hold_out(moonlight_table()).predictions if p.form == "power"]
    assert [p.error for p in found] == pytest.approx([0.0027, 0.0031], abs=2e-4)
    assert all(p.inside for p in found)


def test_interval_covers_the_next_run() -> None:
    hits = []
    for seed in range(60):
        frame = ladder({"adamw": ADAMW}, rungs=7, own=0.004, seed=seed)
        hits += [p.inside for p in hold_out(frame).predictions if p.form == "power"]
    assert np.mean(hits) > 0.86


def test_too_few_rungs_would_remain() -> None:
    with pytest.raises(UserError, match="leaves 2"):
        hold_out(moonlight_table(), rungs=3)


def test_an_arm_without_usable_runs() -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}).assign(status=["finished", "diverged"] * 5)
    with pytest.raises(UserError, match=r"0 usable runs \(5 diverged\)"):
        hold_out(frame, rungs=2)


def test_text_says_how_far_beyond() -> None:
    assert "1.9 times beyond" in holdout_text(hold_out(moonlight_table()))
