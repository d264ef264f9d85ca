"""Ratios in other costs: a cost that differs from FLOPs by a known factor moves the ratio by that factor."""

import numpy as np
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.data.table import check_table
from analysis.ratio.study import fit_table
from analysis.reporting.sentences import explanation


def test_charging_the_optimizer_raises_the_ratio_by_its_share() -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}, shared=0.002, own=0.0004, seeds=2)
    own = np.where(frame["arm"] == "muon", 0.25, 0.0)  # Newton-Schulz as a quarter of 6ND at every size
    frame["flops_with_optimizer"] = frame["flops"] * (1 + own)
    comparison = fit_table(check_table(frame)).comparisons[0]
    charged = next(price for price in comparison.conventions if price.column == "flops_with_optimizer")
    assert charged.label == "FLOPs with the optimizer's own"
    assert charged.ratio == pytest.approx(1.25 * comparison.headline.ratio, rel=0.01)


def test_clocks_of_a_shared_machine_carry_no_ratio() -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}, shared=0.002, own=0.0004, seeds=2)
    frame["cpu_seconds"] = 1e-9 * frame["flops"] ** 0.9
    frame["seconds"] = 1.02 * frame["cpu_seconds"]
    quiet = fit_table(check_table(frame)).comparisons[0]
    assert {"seconds", "cpu_seconds"} <= {price.column for price in quiet.conventions}
    frame["seconds"] *= np.random.default_rng(0).uniform(1.0, 3.0, len(frame))
    study = fit_table(check_table(frame))
    prices = {price.column for price in study.comparisons[0].conventions}
    assert "cpu_seconds" in prices
    assert "seconds" not in prices
    assert any("No ratio in wall-clock" in line for line in explanation(study, study.comparisons[0]))
