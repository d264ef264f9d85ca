"""Proposals per second on one store of trials with one and four processes, and samplers on a recorded grid.

Run: ``python tests/bench/bench_tune.py``. Compare rates within one run only: they depend on the disk and on other work.
"""

from __future__ import annotations

import csv
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "sweeps")]

import test_tune_replay as recorded

from sweeps.tuning.trials import TrialLine, TrialStore

TRIALS = 400


def propose(folder: str, count: int) -> None:
    """Lock the store, read it and append one trial, as each step of a tuner does."""
    store = TrialStore(Path(folder))
    for _ in range(count):
        with store.locked():
            number = len(store.read().get("bench", []))
            store.append([TrialLine(study="bench", number=number, values={"x": 0.5, "y": 0.5}, run=str(number))])


def rate(processes: int) -> float:
    """Trials per second of all processes together, without their start."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=propose, args=(folder, TRIALS // processes)) for _ in range(processes)]
        start = time.perf_counter()
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert len(TrialStore(Path(folder)).read()["bench"]) == TRIALS
        return TRIALS / (time.perf_counter() - start)


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
    print(f"{TRIALS} trials appended to one store")
    for processes in (1, 4):
        print(f"  {processes} process{'es' if processes > 1 else '  '} {rate(processes):6.1f} trials/s")
    replay()
