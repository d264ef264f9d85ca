"""Arms at one budget: the paired difference, its interval, and crossings of curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.data.table import check_table
from analysis.single_arm.same_budget import gaps, last_crossing, outcomes, overtakings
from scaling.errors import UserError

SEEDS = 5


def runs() -> pd.DataFrame:
    """Seeds differ by far more than arms do; the arms differ by 0.02 and a little noise."""
    noise = np.random.default_rng(3)
    rows = []
    for seed in range(SEEDS):
        level = 3.0 + noise.normal(0, 0.2)
        for arm, apart in (("adamw", 0.0), ("muon", -0.02)):
            rows.append((arm, "a", f"a/{seed}", 1e6, 2e7, 1.2e14, level + apart + noise.normal(0, 0.001)))
    return check_table(pd.DataFrame(rows, columns=["arm", "rung", "cell", "params", "tokens", "flops", "loss"])).frame


def test_pairing_by_seed_removes_the_spread_of_seeds() -> None:
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


def test_one_pair_has_no_interval_and_unpaired_seeds_are_left_out() -> None:
    frame = runs()
    alone = frame[(frame["cell"] == "a/0") | ((frame["cell"] == "a/1") & (frame["arm"] == "muon"))]
    muon = outcomes(alone, ("adamw", "muon"))[1]
    assert (muon.seeds, muon.pairs, muon.low, muon.high) == (2, 1, None, None)


def test_sizes_are_budgets_without_a_column_rung() -> None:
    small, large = runs().drop(columns="rung"), runs().drop(columns="rung")
    both = pd.concat([small, large.assign(params=3e6, tokens=6e7, flops=1.08e15, loss=large["loss"] - 1)])
    found = outcomes(check_table(both), ("adamw", "muon"))
    assert [(one.rung, one.arm, one.seeds) for one in found] == [
        (size, arm, SEEDS) for size in ("1.00M", "3.00M") for arm in ("adamw", "muon")
    ]
    assert found[1].difference == pytest.approx(found[3].difference)
    with pytest.raises(UserError, match=r"column rung, a: runs of arm adamw have params from 1e\+06 to 3e\+06"):
        outcomes(check_table(both.assign(rung="a")), ("adamw", "muon"))
    with pytest.raises(UserError, match=r"0 usable runs \(10 diverged\)"):
        outcomes(check_table(small.assign(status="diverged")), ("adamw", "muon"))


def test_seeds_that_share_a_cell_are_paired_by_seed() -> None:
    frame = runs()
    shared = frame.assign(seed=frame["cell"].str[-1], cell="a")
    assert outcomes(shared, ("adamw", "muon")) == outcomes(frame, ("adamw", "muon"))


def test_overtaking_curves_are_found() -> None:
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
