"""Learning-rate schedules: ends, monotony, and equality with torch's cosine."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling.spec import Schedule
from scaling.training.schedule import lr_fraction

TOTAL, BATCH = 1_000_000, 1_000
KINDS = {
    "cosine": Schedule(kind="cosine", warmup_tokens=50_000, final_fraction=0.1),
    "linear": Schedule(kind="linear", warmup_tokens=50_000, final_fraction=0.0),
    "wsd": Schedule(kind="wsd", warmup_tokens=50_000, final_fraction=0.0, decay_tokens=200_000),
    "constant": Schedule(kind="constant", warmup_tokens=50_000, final_fraction=1.0),
}


@pytest.mark.parametrize("schedule", KINDS.values(), ids=KINDS.keys())
def test_first_and_last_rate(schedule: Schedule) -> None:
    assert lr_fraction(schedule, TOTAL, total=TOTAL) == pytest.approx(schedule.final_fraction, abs=1e-12)
    assert 0 < lr_fraction(schedule, BATCH, total=TOTAL) == BATCH / schedule.warmup_tokens
    assert lr_fraction(schedule, schedule.warmup_tokens, total=TOTAL) == 1.0


@pytest.mark.parametrize("schedule", KINDS.values(), ids=KINDS.keys())
@given(tokens=st.lists(st.integers(50_000, TOTAL), min_size=2, max_size=2))
def test_never_rises_after_the_warm_up(schedule: Schedule, tokens: list[int]) -> None:
    early, late = sorted(tokens)
    assert lr_fraction(schedule, late, total=TOTAL) <= lr_fraction(schedule, early, total=TOTAL) <= 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_warm_up_as_long_as_the_run_ends_at_the_peak(kind: Literal["cosine", "linear", "constant"]) -> None:
    assert lr_fraction(Schedule(kind=kind, warmup_tokens=TOTAL), TOTAL, total=TOTAL) == 1.0


def test_cosine_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    schedule = Schedule(kind="cosine", warmup_tokens=0, final_fraction=0.1)
    for step in range(1, 101):
        optimizer.step()
        oracle.step()
        assert math.isclose(lr_fraction(schedule, step * 7, total=700), oracle.get_last_lr()[0], rel_tol=1e-9)


def test_wsd_is_flat_then_linear() -> None:
    schedule = KINDS["wsd"]
    assert lr_fraction(schedule, 800_000, total=TOTAL) == 1.0
    assert lr_fraction(schedule, 900_000, total=TOTAL) == pytest.approx(0.5)
