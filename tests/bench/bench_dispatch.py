"""Benchmark of a thousand runs on a real SLURM: seconds and sbatch calls to submit, seconds for status, files a job.

    python tests/bench/bench_dispatch.py [RUNS]

submitit's own `map_array` is measured in the same run; the jobs are held by a closed partition, so that submission is
timed and not the jobs. Prints the reason and exits if the machine cannot have a SLURM.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "cluster"), str(HERE.parent), str(HERE.parent.parent)]

import submitit
from cluster import Cluster, why_not
from tiny import ON_CPU, arm_table, campaign_head, rung_table

from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.reporting import status
from sweeps.slurm import SlurmExecutor

CAMPAIGN = (
    "seeds = {seeds}"
    + campaign_head("many", evaluation="")
    + arm_table("adamw", "peak_lr = 1e-2")
    + rung_table("a", tokens=1_280)
    + ON_CPU
    + '[placement.slurm]\npartition = "closed"\n'
)

REPEATS = 3


def timed(action: Callable[[], object]) -> tuple[float, object]:
    """Seconds that an action takes, and its result."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def campaign(folder: Path, runs: int) -> CampaignPlan:
    """A plan of so many runs under a folder of its own."""
    text = folder / "text"
    text.mkdir(parents=True)
    for part in range(20):
        (text / f"{part}.txt").write_text(f"part {part} of some words. " * 200)
    file = folder / "many.toml"
    file.write_text(CAMPAIGN.format(seeds=list(range(runs)), text=text))
    return with_data(plan(load_campaign(file), folder / "root"), progress=False)


def count_files(folder: Path) -> int:
    """Files below a folder."""
    return sum(file.is_file() for file in folder.rglob("*"))


def nothing(number: int) -> None:
    """The body of submitit's own jobs."""


def measure(cluster: Cluster, folder: Path, runs: int) -> dict[str, object]:
    """All figures."""
    cluster.run("scontrol", "create", "PartitionName=closed", "Nodes=ALL", "State=DOWN")
    theirs, ours, again, looks, asks, calls = [], [], [], [], [], []
    files: dict[str, float] = {}
    for repeat in range(REPEATS):
        executor = submitit.SlurmExecutor(folder / f"theirs-{repeat}")
        executor.update_parameters(partition="closed", time=5, array_parallelism=runs)
        seconds, _ = timed(lambda executor=executor: executor.map_array(nothing, range(runs)))
        theirs.append(seconds)
        files["submitit"] = count_files(folder / f"theirs-{repeat}") / runs
        cluster.run("scancel", "--me")

        planned = campaign(folder / f"ours-{repeat}", runs)
        before = count_files(planned.root)
        seconds, submission = timed(lambda planned=planned: SlurmExecutor(planned).submit())
        ours.append(seconds)
        calls.append(len(submission.jobs))  # type: ignore[attr-defined]
        files["ours"] = (count_files(planned.root) - before) / runs
        files["ours, for SLURM alone"] = (
            count_files(planned.root / "submissions") + sum(1 for _ in (planned.root / "runs").glob("*/claim"))
        ) / runs
        again.append(timed(lambda planned=planned: SlurmExecutor(planned).submit())[0])
        looks.append(timed(lambda planned=planned: status.rows(planned))[0])
        both = ["squeue -h -r --me", f"sacct -n -X -P -j {','.join(submission.jobs)}"]  # type: ignore[attr-defined]
        asks.append(sum(timed(lambda c=c: subprocess.run(c.split(), capture_output=True, check=True))[0] for c in both))
        cluster.run("scancel", "--me")
    median = statistics.median
    return {
        "runs": runs,
        "sbatch_calls": max(calls),
        "submit_seconds": median(ours),
        "submitit_map_array_seconds": median(theirs),
        "submit_ratio": median(our / their for our, their in zip(ours, theirs, strict=True)),
        "submit_again_seconds": median(again),
        "status_seconds": median(looks),
        "squeue_and_sacct_seconds": median(asks),
        "status_over_slurm_seconds": median(look - ask for look, ask in zip(looks, asks, strict=True)),
        "files_per_run": files,
    }


def main(runs: int = 1000) -> None:
    """Print the figures as JSON."""
    if (reason := why_not()) is not None:
        print(f"not measured: {reason}")
        return
    folder = Path(tempfile.mkdtemp(prefix="scb-", dir="/tmp"))
    folder.chmod(0o755)  # munge wants its socket to be reachable
    cluster = Cluster(folder / "c", name="bench", port=17900)
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    os.environ["SCALING_SLURM_PROFILE"] = str(folder / "profile.toml")
    (folder / "profile.toml").write_text("")
    try:
        cluster.start()
        print(json.dumps(measure(cluster, folder, runs), indent=2))
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
