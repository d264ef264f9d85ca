"""Samplers on a recorded grid: losses are looked up in results/tuning-grid/trials.csv, nothing is trained."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest
from tiny import TINY, make_spec

from scaling.optim.search_space import SearchRange
from sweeps.config.search_space import Dimension
from sweeps.config.tune import TuneConfig
from sweeps.tuning.study import TuningStudy
from sweeps.tuning.trials import RecordCache, Trial

TABLE = Path(__file__).parents[2] / "results" / "tuning-grid" / "trials.csv"
NAMES = ("peak_lr", "batch_tokens", "weight_decay")


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[float, ...], float]:
    with TABLE.open(newline="") as file:
        return {tuple(float(row[name]) for name in NAMES): float(row["loss"]) for row in csv.DictReader(file)}


def trials_until_good(recorded: dict[tuple[float, ...], float], *, sampler: str, seed: int, startup: int) -> int:
    """Number of trials, one at a time, until a loss is within 0.5 % of the grid's best."""
    dimensions = []
    for place, name in enumerate(NAMES):
        values = tuple(sorted({point[place] for point in recorded}))
        row = SearchRange(name=name, scale="log", low=values[0], high=values[-1], least=values[0], most=values[-1])
        dimensions.append(Dimension(search=row, values=values))
    study = TuningStudy(
        arm="adamw", rung="25k", template=make_spec(shape=TINY), dimensions=tuple(dimensions),
        config=TuneConfig(
            sampler=sampler, startup=startup, seed=seed, trials=len(recorded), in_flight=1, widen=0  # type: ignore[arg-type]
        ),
        records=RecordCache(Path("nowhere")),
    )  # fmt: skip
    good = min(recorded.values()) * 1.005
    trials: list[Trial] = []
    while True:
        values = study.next_values(trials)
        loss = recorded[tuple(values[name] for name in NAMES)]
        trials.append(Trial(number=len(trials), values=values, run="", state="complete", loss=loss))
        if loss <= good:
            return len(trials)


def test_tpe_needs_at_most_half_of_the_grids_trials(recorded: dict[tuple[float, ...], float]) -> None:
    needed = [trials_until_good(recorded, sampler="tpe", seed=seed, startup=8) for seed in range(20)]
    assert len(recorded) == 72
    assert statistics.median(needed) <= len(recorded) / 2


def test_a_study_tries_no_setting_twice(recorded: dict[tuple[float, ...], float]) -> None:
    # Quasi-random points on a grid repeat; a study replaces repetitions, so the search always ends.
    assert trials_until_good(recorded, sampler="quasi-random", seed=1, startup=0) <= len(recorded)
