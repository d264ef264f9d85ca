"""Samplers on a recorded grid: the number of trials until a loss is close to the grid's best.

Run: ``python tests/bench/bench_tune.py``.
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "sweeps")]

import test_tune_replay as recorded


def replay() -> None:
    """Print the number of trials until a loss is within 0.5 % of the recorded grid's best, over 20 seeds."""
    with recorded.TABLE.open(newline="") as file:
        losses = {
            tuple(float(row[name]) for name in recorded.NAMES): float(row["loss"]) for row in csv.DictReader(file)
        }
    print(f"Recorded grid of {len(losses)} runs: trials until within 0.5 % of its best loss, 20 seeds")
    for sampler, startup in (("tpe", 8), ("quasi-random", 0)):
        needed = sorted(
            recorded.trials_until_good(losses, sampler=sampler, seed=seed, startup=startup) for seed in range(20)
        )
        print(f"  {sampler:13s} median {statistics.median(needed):4.1f}  quartiles {needed[5]} to {needed[14]}")


if __name__ == "__main__":
    replay()
