"""What a SLURM job executes: ``python -m sweeps.slurm.job RECORD``, one process for each task of the run.

The job is its place in an array's record. It finds its run there, or the few that share its device, makes sure that
nobody else trains it and that the code is the one that was submitted, and trains. It never requeues itself:
`sweeps.slurm.requeue` does, once, after all processes have ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from scaling.errors import UserError
from scaling.io import read_json
from scaling.run.directory import RunDirectory
from scaling.training.pool import own_log
from sweeps.slurm.array_records import ArrayRecord, note_began, owner_of
from sweeps.slurm.job_exits import LEFT_EARLY, REFUSED
from sweeps.slurm.lease import LOST_LEASE, hold
from sweeps.slurm.snapshot import code_digest

ENDING_SECONDS = 20.0
"""That an earlier attempt's process may take to end, before its lock means that somebody else trains."""


def main(record_file: str) -> int:
    """Train the run of this job, or its pack of runs; the exit status is for `sweeps.slurm.requeue`."""
    array = read_json(Path(record_file), ArrayRecord)
    runs = array.runs_of(int(os.environ["SLURM_ARRAY_TASK_ID"]))
    if array.per_task > 1:
        from sweeps.slurm.packed_job import train_pack

        return train_pack(Path(record_file), runs)
    return train_run(Path(record_file), runs[0], leader=os.environ.get("SLURM_PROCID", "0") == "0")


def train_run(record_file: Path, run: str, *, leader: bool = True) -> int:
    """Train a run in this process; the exit status.

    Args:
        record_file: The array's record, under the run root.
        run: Run id.
        leader: Whether this is the first of the run's processes, which keeps its books.
    """
    array = read_json(record_file, ArrayRecord)
    root = record_file.parent.parent
    directory = RunDirectory(root / "runs" / run)
    _leave_when_asked(directory, leader=leader)
    if (owner := owner_of(root, run)) not in (None, array.token):
        print(f"submission {owner} has taken this run over; leaving it to that one", flush=True)
        return LOST_LEASE
    if leader:
        note_began(root, run, array)
        own_log(directory.path)
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
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        if leader and not _noted(directory, str(error)):
            directory.note("end", step=0, outcome="failed", reason=str(error), job=job)
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
        from scaling.training.loop import train

        train(directory.path, progress=False)
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _check_code(array: ArrayRecord) -> None:
    found = code_digest()
    if found != array.code:
        raise UserError(
            f"the code is {found} now, and this run was submitted with {array.code}. "
            "Cancel its job and submit again, or put the code back."
        )


def _noted(directory: RunDirectory, reason: str) -> bool:
    attempts = directory.attempts()
    return bool(attempts) and attempts[-1].reason == reason


def _leave_when_asked(directory: RunDirectory, *, leader: bool) -> None:
    """Until training has begun, a signal ends the process at once: there is nothing to save yet.

    While it trains, the training loop has the signals and saves at the step boundary; when it is over, what is
    left is to write the record, which takes less time than doing the last steps again.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        row = directory.last_row()
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
