"""Ask and tell on one journal file: trials a second with one and with four processes, and TPE against a recorded grid.

Run: ``python tests/bench/bench_tune.py``. The journal is ours (a kernel lock, a trial in one record, a fixed end of
file) beside Optuna's own way (its symlink lock, a record for each parameter and attribute), in one run on one disk.
Trials a second belong to the disk's fsync and can only be compared within a run.
"""

from __future__ import annotations

import csv
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[2]),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "sweeps"),
]

from sweeps.tuning.trials import Journal, add_running, tell

TRIALS = 80


def ours(path: str, count: int) -> None:
    """Ask and tell through `Journal`."""
    from optuna.distributions import FloatDistribution

    journal = Journal(Path(path))
    space = {name: FloatDistribution(0.0, 1.0) for name in ("x", "y", "z")}
    for _ in range(count):
        with journal.held():
            study = journal.study("bench")
            number = add_running(study, dict.fromkeys(space, 0.5), space, "run")
        with journal.held():
            tell(journal.study("bench"), number, 1.0)


def plain(path: str, count: int) -> None:
    """Ask and tell as Optuna's documentation has it."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(path))
    study = optuna.create_study(
        study_name="bench", storage=storage, load_if_exists=True, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for _ in range(count):
        trial = study.ask()
        for name in ("x", "y", "z"):
            trial.suggest_float(name, 0.0, 1.0)
        trial.set_user_attr("run", "run")
        study.tell(trial, 1.0)


def rate(work: Callable[[str, int], None], processes: int) -> float:
    """Trials a second of all processes together, their start left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "journal.log")
        work(path, 2)  # imports, and the study is there
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=work, args=(path, TRIALS // processes)) for _ in range(processes)]
        begun = time.perf_counter()
        for child in children:
            child.start()
        for child in children:
            child.join()
        return TRIALS / (time.perf_counter() - begun)


def replay() -> None:
    """Trials until a setting is within 0.5 % of the recorded grid's best loss, over 20 seeds."""
    import test_tune_replay as recorded

    with recorded.TABLE.open(newline="") as file:
        losses = {
            tuple(float(row[name]) for name in recorded.NAMES): float(row["loss"]) for row in csv.DictReader(file)
        }
    print(f"Recorded grid of {len(losses)} runs: trials until within 0.5 % of its best loss, 20 seeds")
    for sampler, startup in (("tpe", 8), ("quasi-random", 0)):
        needed = sorted(
            recorded.trials_until_good(losses, sampler=sampler, seed=seed, startup=startup) for seed in range(20)
        )
        print(
            f"  {sampler:13s} median {statistics.median(needed):4.1f}  quarter to three quarters {needed[5]}-{needed[14]}"
        )


if __name__ == "__main__":
    print(f"{TRIALS} trials of three parameters, asked and told on one journal file")
    for name, work in (("ours", ours), ("Optuna's own", plain)):
        for processes in (1, 4):
            print(
                f"  {name:13s} {processes} process{'es' if processes > 1 else '  '} {rate(work, processes):6.1f} trials/s"
            )
    replay()
