"""A job that trains several runs side by side on its devices, each an ordinary run with its lease, attempts and record.

One that fails or is killed takes none of its neighbours down; how each ended is noted for `sweeps.slurm.requeue`, which
starts the job again for those that can go on and gives the others up.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

from scaling.run.directory import RunDirectory
from scaling.training.pool import device_slots, note_kill, side_by_side
from sweeps.slurm.array_records import CANCELLED
from sweeps.slurm.job import train_run
from sweeps.slurm.job_exits import LEFT_EARLY, exit_of, reason_abandoned, record_exit


def train_pack(record_file: Path, runs: tuple[str, ...]) -> int:
    """Train the runs of a job at the same time; 0, for each run has its own ending."""
    root = record_file.parent.parent
    directories = [RunDirectory(root / "runs" / run) for run in runs]
    # SLURM starts the job again as a whole: who is done or was given up has no part in it.
    open_ended = [run for run in directories if not run.record_file.exists() and reason_abandoned(run) is None]
    for signum in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, lambda *_: os._exit(LEFT_EARLY))  # until runs have begun, there is nobody to tell
    # A device is given to each run where there are any; runs on processors share what the job has.
    on_processors = all(run.placement().device == "cpu" for run in open_ended)
    devices = [] if on_processors else device_slots(len(open_ended))
    gpus = dict(zip((run.path.name for run in open_ended), devices, strict=False))
    side_by_side(
        [run.path for run in open_ended if not _is_cancelled(run)],
        at_once=len(runs),
        work=partial(_work, record_file=str(record_file), gpus=gpus),
        ended=_note,
        leave=_is_cancelled,
    )
    return 0


def _is_cancelled(directory: RunDirectory) -> bool:
    return (directory.path / CANCELLED).exists()


def _note(directory: RunDirectory, exit_code: int) -> None:
    if exit_code < 0:
        note_kill(directory, exit_code)
    if directory.record_file.exists():
        return
    ending = exit_of(
        directory,
        job=f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}",
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        node=os.environ.get("SLURMD_NODENAME"),
        status=128 - exit_code if exit_code < 0 else exit_code,
    )
    record_exit(directory, ending)


def _work(path: str, *, record_file: str, gpus: dict[str, str]) -> None:
    """The life of a run's process."""
    run = Path(path).name
    if run in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[run]  # read when CUDA starts, which has not happened here
    os.setsid()
    sys.exit(train_run(Path(record_file), run))
