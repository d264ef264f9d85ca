"""Arms at one budget: the paired difference, its interval, and where one curve overtakes another."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.data.table import check_table
from analysis.single_arm.same_budget import gaps, last_crossing, outcomes, overtakings

SEEDS = 5


def runs() -> pd.DataFrame:
    """Seeds differ by far more than arms do; the arms differ by 0.02 and a little noise."""
    noise = np.random.default_rng(3)
    rows = []
    for seed in range(SEEDS):
        level = 3.0 + noise.normal(0, 0.2)
        for arm, apart in (("adamw", 0.0), ("muon", -0.02)):
            rows.append((arm, "a", f"a/{seed}", 1e6, 2e7, 1.2e14, level + apart + noise.normal(0, 0.001)))
    return check_table(pd.DataFrame(rows, columns=["arm", "rung", "cell", "params", "tokens", "flops", "loss"]))


def test_a_small_difference_is_seen_through_the_spread_of_seeds() -> None:
    from scipy.stats import ttest_rel

    frame = runs()
    adamw, muon = outcomes(frame, ("adamw", "muon"))
    assert adamw.difference is None
    assert muon.pairs == SEEDS
    assert muon.difference == pytest.approx(-0.02, abs=0.002)
    theirs = [frame.loc[frame["arm"] == arm, "loss"].to_numpy() for arm in ("muon", "adamw")]
    interval = ttest_rel(*theirs).confidence_interval(0.95)
    assert (muon.low, muon.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert muon.spread is not None
    assert muon.spread > 10 * abs(muon.difference) / 4


def test_one_seed_has_a_difference_and_no_interval_and_an_unpaired_seed_counts_for_neither() -> None:
    frame = runs()
    alone = frame[(frame["cell"] == "a/0") | ((frame["cell"] == "a/1") & (frame["arm"] == "muon"))]
    muon = outcomes(alone, ("adamw", "muon"))[1]
    assert (muon.seeds, muon.pairs, muon.low, muon.high) == (2, 1, None, None)


def test_where_one_curve_overtakes_another() -> None:
    tokens = np.array([10.0, 20.0, 30.0, 40.0])
    losses = {"adamw": [3.0, 3.0, 3.0, 3.0], "fast": [2.8, 2.9, 2.95, 2.96], "slow": [2.9, 2.92, 2.91, 2.90]}
    curves = pd.DataFrame(
        [
            (arm, "a", seed, t, loss + seed + 1e-4 * (seed and arm == "slow"))
            for arm, along in losses.items()
            for seed in (0, 1)
            for t, loss in zip(tokens, along, strict=True)
        ],
        columns=["arm", "rung", "seed", "tokens", "validation_loss"],
    )
    table = gaps(curves, baseline="adamw")
    assert table.loc[table["arm"] == "fast", "gap"].to_numpy() == pytest.approx([-0.2, -0.1, -0.05, -0.04])
    assert last_crossing(table[table["arm"] == "slow"]) == 10.0
    (found,) = overtakings(curves, ["adamw", "fast", "slow"])
    assert (found.arm, found.other) == ("slow", "fast")
    assert found.tokens == pytest.approx(20 + 10 * 0.02 / 0.06, rel=1e-2)
    assert found.gap == pytest.approx(-0.06, rel=1e-2)
    assert not overtakings(curves[curves["seed"] == 0], ["adamw", "fast", "slow"])  # one seed cannot be sure
