"""What the batch script does when all processes of a run have ended: ``python -m sweeps.aftermath RECORD STATUS TRIES``.

The one place where a job is requeued. A run that can continue goes back into the queue; one that was killed several
times without a step of progress is given up, with the end of its log; one that failed by itself waits for a person.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from scaling.records import RunDirectory, append_line, read_json, read_lines
from scaling.spec import Strict
from sweeps.arrays import ArrayRecord
from sweeps.lease import LOST_LEASE
from sweeps.slurm import Unreachable, ask
from sweeps.worker import LEFT_EARLY, LOG, REFUSED

LOG_LINES = 5

ENDINGS = "endings.jsonl"
PATIENCE = 5
"""Endings without progress, of any kind, that are borne for each of the `tries` that kills are: a run that is asked to
leave before it can take a step wastes an allocation as surely as one that is killed."""


class Ending(Strict, frozen=True):
    """One line of endings.jsonl: how a job's processes ended before the run was done."""

    job: str
    status: int
    """Of srun: 0 and `LEFT_EARLY` where the run was asked to stop, 128 + n where signal n killed it."""
    step: int
    """That the next attempt will start from."""
    time: float


def main(record_file: str, status: int, tries: int) -> int:
    """Requeue the job, or leave it ended; returns the job's exit status."""
    file = Path(record_file)
    array = read_json(file, ArrayRecord)
    directory = RunDirectory(file.parent.parent / "runs" / array.runs[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    if directory.record_file.exists() or status == LOST_LEASE:
        return 0
    job, step = os.environ["SLURM_JOB_ID"], resume_step(directory)
    try:
        append_line(directory.path / ENDINGS, Ending(job=job, status=status, step=step, time=time.time()))
        reason = _hopeless(directory, status, tries)
        if reason is None:
            return _requeue(job)
        if directory.state() != "failed":
            directory.note("end", step=step, outcome="failed", reason=reason, job=job)
    except OSError as error:  # a run that cannot even note its end must not be started again and again
        reason = f"{directory.path}: {error.strerror}; the run's end could not be noted. Make room, and submit again."
    print(reason, file=sys.stderr)
    return status or 1


def _hopeless(directory: RunDirectory, status: int, tries: int) -> str | None:
    """Why starting the run again would not help, or None."""
    if status in (1, REFUSED):
        return f"its program ended with an error; {log_tail(directory)}"
    killed, barren = fruitless(read_lines(directory.path / ENDINGS, Ending))
    if killed >= tries:
        return f"{killed} attempts were killed without a step of progress; {log_tail(directory)}"
    if barren >= tries * PATIENCE:
        return f"{barren} attempts had to leave before a step of progress; ask for more minutes, or another partition"
    return None


def fruitless(endings: list[Ending]) -> tuple[int, int]:
    """How many endings in a row, up to the last, were kills, and how many there were at all, without progress."""
    same = []
    for ending in reversed(endings):
        if ending.step != endings[-1].step:
            break
        same.append(ending)
    return sum(ending.status not in (0, LEFT_EARLY) for ending in same), len(same)


def resume_step(directory: RunDirectory) -> int:
    """The step of the newest resume point, by its name; 0 where there is none."""
    steps = [re.match(r"step-(\d+)\.", point.name) for point in directory.checkpoints.glob("step-*.ckpt")]
    return max((int(step[1]) for step in steps if step), default=0)


def log_tail(directory: RunDirectory) -> str:
    """The end of what the run printed, as one clause."""
    log = directory.path / LOG
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log"
    return f"its log ends: {' / '.join(lines[-LOG_LINES:])}"[:1000] if lines else "its log is empty"


def _requeue(job: str) -> int:
    """Back into the queue, unless somebody is ending this job: a cancelled one stays cancelled."""
    try:
        state = re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", job))
        if state is None or state[1] != "RUNNING":
            return 0
        ask("scontrol", "requeue", job)
    except Unreachable as error:
        print(f"cannot requeue: {error}. Submit the campaign again to continue this run.", file=sys.stderr)
        return LEFT_EARLY
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
