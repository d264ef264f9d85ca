"""A price that differs from FLOPs by a known factor moves the ratio by that factor."""

import numpy as np
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.load import check_table
from analysis.study import fit_table


def test_charging_the_optimizer_raises_the_ratio_by_its_share() -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}, shared=0.002, own=0.0004, seeds=2)
    own = np.where(frame["arm"] == "muon", 0.25, 0.0)  # Newton-Schulz as a quarter of 6ND at every size
    frame["flops_with_optimizer"] = frame["flops"] * (1 + own)
    comparison = fit_table(check_table(frame)).comparisons[0]
    charged = next(price for price in comparison.conventions if price.column == "flops_with_optimizer")
    assert charged.label == "FLOPs with the optimizer's own"
    assert charged.ratio == pytest.approx(1.25 * comparison.headline.ratio, rel=0.01)
