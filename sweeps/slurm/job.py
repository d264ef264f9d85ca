"""The program of a SLURM job: ``python -m sweeps.slurm.job RECORD``, one process for each task of the run.

The array's record and the task's index name the run, or the few runs that train side by side. A job never requeues itself:
`sweeps.slurm.requeue` does so once all processes have ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

from scaling.errors import UserError
from scaling.io import append_line, read_json
from scaling.run.directory import RunDirectory
from scaling.training.pool import device_slots, note_kill, own_log, side_by_side
from sweeps.slurm.array_records import CANCELLED, ArrayRecord, note_began, owner_of
from sweeps.slurm.exit_codes import DONE, ERROR, INVALID_RUN, LEASE_LOST, LEFT_EARLY
from sweeps.slurm.lease import hold
from sweeps.slurm.requeue import exit_of, needs_no_job
from sweeps.slurm.sbatch import code_digest

UNLOCK_SECONDS = 20.0
"""Time that an earlier attempt's process may take to end; after it, its lock means that another process trains."""


def main(record_file: str) -> int:
    """Train the run or the runs of this job; the exit status is for `sweeps.slurm.requeue`."""
    file = Path(record_file)
    array = read_json(file, ArrayRecord)
    runs = array.runs_of(int(os.environ["SLURM_ARRAY_TASK_ID"]))
    if array.per_task > 1:
        return train_side_by_side(file, runs)
    return train_run(file, runs[0], leader=os.environ.get("SLURM_PROCID", "0") == "0")


def train_run(record_file: Path, run: str, *, leader: bool = True) -> int:
    """Train a run in this process; the exit status. Of several processes of a run, only the leader writes its files."""
    array = read_json(record_file, ArrayRecord)
    root = record_file.parent.parent
    directory = RunDirectory(root / "runs" / run)
    _exit_on_signal(directory, leader=leader)
    if (owner := owner_of(root, run)) not in (None, array.token):
        print(f"submission {owner} has taken over this run; this job leaves it", flush=True)
        return LEASE_LOST
    if leader:
        note_began(root, run, array)
        own_log(directory.path)
    if directory.record() is not None:
        print("finished before; nothing to do", flush=True)
        return DONE
    job, restart = os.environ.get("SLURM_JOB_ID", "?"), os.environ.get("SLURM_RESTART_COUNT", "0")
    print(f"job {job}, restart {restart}, on {os.environ.get('SLURMD_NODENAME', os.uname().nodename)}", flush=True)
    try:
        if (found := code_digest()) != array.code:
            raise UserError(
                f"the code's digest is {found}, and this run was submitted with {array.code}. "
                "Cancel its job and submit again, or restore the code."
            )
        with hold(directory.path, job=job) if leader else nullcontext(True) as held:
            if leader and not (held and _is_free(directory)):
                print("another process trains this run; this job leaves it", flush=True)
                return LEASE_LOST  # not DONE: the other processes of this job would wait for this one
            from scaling.training.loop import train

            train(directory.path, progress=False)
            return DONE
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        attempts = directory.attempts()
        if leader and (not attempts or attempts[-1].reason != str(error)):
            directory.note("end", step=0, outcome="failed", reason=str(error), job=job)
        return INVALID_RUN
    except Exception:
        traceback.print_exc()
        return ERROR


def _is_free(directory: RunDirectory) -> bool:
    deadline = time.monotonic() + UNLOCK_SECONDS
    while directory.is_locked():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _exit_on_signal(directory: RunDirectory, *, leader: bool) -> None:
    """Exit on SIGUSR2 or SIGTERM while the run does not train; during training the loop saves at the step boundary.

    After the last step a signal is ignored, because writing the record takes less time than taking the last steps again.
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


def train_side_by_side(record_file: Path, runs: tuple[str, ...]) -> int:
    """Train the runs of a job at the same time, each with its own lease, attempts and record; always `DONE`.

    Each exit is recorded for `sweeps.slurm.requeue`, which starts the job again for the runs that can continue.
    """
    root = record_file.parent.parent
    directories = [RunDirectory(root / "runs" / run) for run in runs]
    # SLURM restarts the job as a whole: runs that are done, were cancelled or abandoned take no part in it.
    unfinished = [run for run in directories if not needs_no_job(run)]
    for signum in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, lambda *_: os._exit(LEFT_EARLY))  # until runs have started, there is nothing to save
    # Each run gets a device if there are any; runs on processors share those of the job.
    on_cpu = all(run.placement().device == "cpu" for run in unfinished)
    devices = [] if on_cpu else device_slots(len(unfinished))
    gpus = dict(zip((run.path.name for run in unfinished), devices, strict=False))
    side_by_side(
        [run.path for run in unfinished],
        at_once=len(runs),
        work=partial(_train_member, record_file=str(record_file), gpus=gpus),
        ended=_record_exit,
        leave=lambda run: (run.path / CANCELLED).exists(),
    )
    return DONE


def _record_exit(directory: RunDirectory, exit_code: int) -> None:
    if exit_code < 0:
        note_kill(directory, exit_code)
    if not directory.record_file.exists():
        status = 128 - exit_code if exit_code < 0 else exit_code
        append_line(directory.attempts_file, exit_of(directory, status))


def _train_member(path: str, *, record_file: str, gpus: dict[str, str]) -> None:
    run = Path(path).name
    if run in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[run]  # read when CUDA starts, which has not happened here
    os.setsid()
    sys.exit(train_run(Path(record_file), run))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
