"""What a SLURM job executes: ``python -m sweeps.worker RECORD``, one process for each task of the run.

The job is its place in an array's record. It finds the run there, makes sure that nobody else trains it and that the
code is the one that was submitted, and trains. It never requeues itself: `sweeps.aftermath` does, once, after all
processes have ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from scaling.errors import Refusal
from scaling.records import RunDirectory, read_json
from sweeps.arrays import ArrayRecord, note_began
from sweeps.lease import LOST_LEASE, hold
from sweeps.snapshot import code_digest

LEFT_EARLY = 75
"""Exit status: asked to leave before training began; nothing is lost, and it may be started again."""

REFUSED = 2
"""Exit status: the run cannot be trained as it is; starting it again would not help."""

ENDING_SECONDS = 20.0
"""That an earlier attempt's process may take to end, before its lock means that somebody else trains."""

LOG = "log.txt"


def main(record_file: str) -> int:
    """Train the run of this job; the exit status is for `sweeps.aftermath`."""
    file = Path(record_file)
    array = read_json(file, ArrayRecord)
    root, run = file.parent.parent, array.runs[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    directory = RunDirectory(root / "runs" / run)
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    leader = rank == 0
    _leave_when_asked(directory, leader=leader)
    if leader:
        note_began(root, run, array)
        _log_into(directory)
    if directory.record() is not None:
        print("finished before; nothing to do", flush=True)
        return 0
    job = os.environ.get("SLURM_JOB_ID", "?")
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(f"job {job}, restart {attempt}, on {os.environ.get('SLURMD_NODENAME', os.uname().nodename)}", flush=True)
    try:
        _check_code(array)
        if not leader:
            return _train(directory)
        with hold(directory.path, job=job) as held:
            if not held or not _unlocked(directory):
                print("another process trains this run; leaving it to that one", flush=True)
                return LOST_LEASE  # not 0: the other processes of this job would wait for this one
            return _train(directory)
    except Refusal as refusal:
        print(refusal, file=sys.stderr, flush=True)
        if leader and not _noted(directory, str(refusal)):
            directory.note("end", step=0, outcome="failed", reason=str(refusal), job=job)
        return REFUSED


def _unlocked(directory: RunDirectory) -> bool:
    """Whether nobody on this host, the local executor for one, trains the run; an attempt that is ending gets a while."""
    deadline = time.monotonic() + ENDING_SECONDS
    while directory.is_locked():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _train(directory: RunDirectory) -> int:
    try:
        from scaling.train import train

        train(directory.path, progress=False)
    except Refusal:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _check_code(array: ArrayRecord) -> None:
    found = code_digest()
    if found != array.code:
        raise Refusal(
            f"the code is {found} now, and this run was submitted with {array.code}. "
            "Cancel its job and submit again, or put the code back."
        )


def _noted(directory: RunDirectory, reason: str) -> bool:
    attempts = directory.attempts()
    return bool(attempts) and attempts[-1].reason == reason


def _log_into(directory: RunDirectory) -> None:
    """What the run prints goes into its own directory as well as to whoever looks at SLURM's file."""
    log = os.open(directory.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _leave_when_asked(directory: RunDirectory, *, leader: bool) -> None:
    """Until training has begun, a signal ends the process at once: there is nothing to save yet.

    While it trains, the training loop has the signals and saves at the border of a step; when it is over, what is
    left is to write the record, which takes less time than doing the last steps again.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        from sweeps.status import last_row

        row = last_row(directory)
        if row is not None and row.step >= directory.spec().steps:
            return
        attempts = directory.attempts()
        if leader and attempts and attempts[-1].event == "start" and attempts[-1].pid == os.getpid():
            directory.note("end", step=attempts[-1].step, outcome="preempted", reason=signal.Signals(signum).name)
        os._exit(LEFT_EARLY)

    for signum in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, leave)
    signal.signal(signal.SIGCONT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
