"""Predicted hours: what one measured size says of the others, how runs fill a machine, what they cost."""

from pathlib import Path

import numpy as np
import pytest

from sweeps.campaign import load_campaign
from sweeps.cost import fit_speed, wall_hours
from sweeps.plan import plan
from sweeps.show import plan_costs, plan_totals, to_go

ASSUMED = 36e9
SIZES = np.array([2.2e5, 3.5e5, 5.1e5, 6.8e5, 1.15e6])
LAYERS = 3 / 1024


def seconds(layer: float, rate: float) -> list[float]:
    return (layer * LAYERS + SIZES / rate).tolist()


@pytest.mark.parametrize("rate", [27e9, 36e9, 46e9])
def test_one_measured_size_predicts_the_others_within_a_quarter(rate: float) -> None:
    truth = seconds(3.2e-3, rate)
    speed = fit_speed(((SIZES[0], LAYERS, truth[0]),), ASSUMED)
    for flops, known in zip(SIZES[1:], truth[1:], strict=True):
        assert speed.seconds_per_token(flops, LAYERS) == pytest.approx(known, rel=0.25)


def test_two_measured_sizes_outvote_the_assumption() -> None:
    truth = seconds(2e-3, 4 * ASSUMED)
    points = tuple((SIZES[k], LAYERS, truth[k]) for k in (0, 3))
    speed = fit_speed(points, ASSUMED)
    assert speed.seconds_per_token(SIZES[4], LAYERS) == pytest.approx(truth[4], rel=0.1)


def test_measured_rungs_of_the_kept_campaign_are_predicted_from_the_first() -> None:
    """Rungs of results/demo: seconds a token, AdamW, two seeds of 21k to 60k and one of 83k, two runs at a time.

    The largest is left out: other work shared the machine while it ran, and it took 2.4 times what its FLOPs take.
    """
    flops = (216_576, 348_672, 510_720, 681_984)
    measured = (15.01e-6, 15.83e-6, 21.10e-6, 25.58e-6)
    speed = fit_speed(((float(flops[0]), LAYERS, measured[0]),), ASSUMED)
    for count, known in zip(flops[1:], measured[1:], strict=True):
        assert speed.seconds_per_token(count, LAYERS) == pytest.approx(known, rel=0.25)


def test_runs_fill_the_slots_that_fall_free() -> None:
    assert wall_hours([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert wall_hours([1.0, 1.0, 1.0], 1) == 3.0
    assert wall_hours([], 4) == 0.0


def test_money_and_energy_follow_the_hours_of_what_is_planned(tmp_path: Path) -> None:
    free = plan_totals(plan(load_campaign("quick"), tmp_path))
    assert free["price"] is None
    assert free["kilowatt_hours"] is None
    priced = plan(load_campaign("quick", settings=("placement.price=2.5", "placement.watts=700")), tmp_path)
    totals = plan_totals(priced)
    hours = sum(plan_costs(priced)[run.id].gpu_hours for run in priced.distinct())
    assert totals["price"] == pytest.approx(2.5 * hours)
    assert totals["kilowatt_hours"] == pytest.approx(0.7 * hours)


def test_tuning_is_counted(tmp_path: Path) -> None:
    totals = plan_totals(plan(load_campaign("quick-tuned"), tmp_path))
    assert 0.0 < totals["tuning_gpu_hours"] < totals["gpu_hours"]


def test_status_says_what_is_left_and_what_it_costs(tmp_path: Path) -> None:
    left = to_go(plan(load_campaign("quick", settings=("placement.price=2.5",)), tmp_path))
    assert len(left) == 1
    assert "to wait at" in left[0]
    assert "price of the whole" in left[0]
    assert left[0].endswith("(assumed speed).")
