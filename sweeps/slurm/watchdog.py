"""Beside the processes of a job: ``python -m sweeps.slurm.watchdog RECORD SECONDS``, which ends those that hang.

A process that is stopped, or waits for one that is, beats no alarm itself, and would hold its devices up to the time
limit. Progress is seen in the run's files, by this process's own clock: a row of metrics, a checkpoint, a line in the
log. A run without any for so many seconds has its processes killed, and `sweeps.slurm.requeue` starts it again.
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
from sweeps.slurm.client import Unreachable, ask

CHECKS_PER_STALL_WINDOW = 20
"""At each run in the time that it may be still."""


def main(record_file: str, seconds: float) -> None:
    """Watch until this process is ended with its job."""
    file = Path(record_file)
    array = read_json(file, ArrayRecord)
    runs = array.runs_of(int(os.environ["SLURM_ARRAY_TASK_ID"]))
    directories = [RunDirectory(file.parent.parent / "runs" / run) for run in runs]
    seen = {directory.path: (traces(directory), time.monotonic()) for directory in directories}
    while True:
        time.sleep(seconds / CHECKS_PER_STALL_WINDOW)
        for directory in directories:
            now, (before, since) = traces(directory), seen[directory.path]
            if now != before or directory.record_file.exists():
                seen[directory.path] = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                _end(directory, seconds, alone=len(directories) == 1)
                seen[directory.path] = traces(directory), time.monotonic()


def traces(directory: RunDirectory) -> tuple[object, ...]:
    """What changes when a run takes steps."""
    sizes = []
    for file in (directory.metrics_file, directory.path / LOG, directory.attempts_file):
        try:
            sizes.append(file.stat().st_size)
        except OSError:
            sizes.append(0)
    return *sizes, *sorted(point.name for point in directory.checkpoints.glob("*.ckpt"))


def _end(directory: RunDirectory, seconds: float, *, alone: bool) -> None:
    attempts = directory.attempts()
    if not attempts or attempts[-1].event != "start":
        if not alone:
            return  # the run has no process of its own now
    else:
        row = directory.last_row()
        reason = f"it left no trace of a step for {seconds:g} s and was taken to hang"
        with contextlib.suppress(OSError):
            directory.note("end", step=row.step if row else 0, outcome="failed", reason=reason)
    if alone:
        with contextlib.suppress(Unreachable):
            ask("scancel", "--signal=KILL", f"{os.environ['SLURM_JOB_ID']}.0")
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(attempts[-1].pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
