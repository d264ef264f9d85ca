"""The watchdog of a job: ``python -m sweeps.slurm.watchdog RECORD SECONDS`` kills the processes of a run that hangs.

A process that is stopped, or waits for one that is, would occupy its devices up to the time limit. Progress is a change in
the run's files, by this process's own clock. A killed run is started again by `sweeps.slurm.requeue`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from scaling.io import read_json
from scaling.run.directory import LOG, RunDirectory
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.client import CommandError, run_slurm

CHECKS_PER_STALL_WINDOW = 20


def main(record_file: str, seconds: float) -> None:
    """Watch until this process is ended with its job."""
    file = Path(record_file)
    runs = read_json(file, ArrayRecord).runs_of(int(os.environ["SLURM_ARRAY_TASK_ID"]))
    directories = [RunDirectory(file.parent.parent / "runs" / run) for run in runs]
    last = {directory.path: (progress_of(directory), time.monotonic()) for directory in directories}
    while True:
        time.sleep(seconds / CHECKS_PER_STALL_WINDOW)
        for directory in directories:
            now, (before, since) = progress_of(directory), last[directory.path]
            if now != before or directory.record_file.exists():
                last[directory.path] = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                _kill(directory, seconds, alone=len(directories) == 1)
                last[directory.path] = progress_of(directory), time.monotonic()


def progress_of(directory: RunDirectory) -> tuple[object, ...]:
    """Sizes and names that change when a run takes steps."""
    sizes = []
    for file in (directory.metrics_file, directory.path / LOG, directory.attempts_file):
        try:
            sizes.append(file.stat().st_size)
        except OSError:
            sizes.append(0)
    return *sizes, *sorted(checkpoint.name for checkpoint in directory.checkpoints.glob("*.ckpt"))


def _kill(directory: RunDirectory, seconds: float, *, alone: bool) -> None:
    attempts = directory.attempts()
    if is_training := bool(attempts) and attempts[-1].event == "start":
        row = directory.last_row()
        reason = f"it took no step for {seconds:g} s and was assumed to hang"
        with contextlib.suppress(OSError):
            directory.note("end", step=row.step if row else 0, outcome="failed", reason=reason)
    if alone:
        with contextlib.suppress(CommandError):
            run_slurm("scancel", "--signal=KILL", f"{os.environ['SLURM_JOB_ID']}.0")
    elif is_training:  # else the run has no process of its own now
        with contextlib.suppress(ProcessLookupError):
            os.kill(attempts[-1].pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
