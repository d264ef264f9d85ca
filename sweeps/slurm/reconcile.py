"""What a submitter that was killed half-way has left, put right by the next one from SLURM's queue."""

from __future__ import annotations

import os
import time
from pathlib import Path

from scaling.errors import UserError
from sweeps.slurm import array_records
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.client import Unreachable, named
from sweeps.slurm.lease import is_alive

IN_FLIGHT_SECONDS = 15.0
"""How long a call of sbatch whose caller was killed may still reach SLURM."""

AT_WORK_SECONDS = 600.0
"""How long a submitter on another host, whom nobody here can see, is taken to be at work; and the most for any."""


def repair(root: Path) -> None:
    """Finish what killed submitters began: adopt their jobs, or free their runs where SLURM never got one.

    Raises:
        UserError: SLURM cannot say whether it got a job.
    """
    for array in array_records.all_arrays(root):
        if array.job is not None or _at_work(array):
            continue
        while True:
            try:
                job = named(array.name)
            except Unreachable as error:
                raise UserError(
                    f"an earlier submission was interrupted, and SLURM cannot say whether it got it: {error}. "
                    "Submit again when it can."
                ) from None
            if job is not None:
                array_records.with_job(root, array, job)
                break
            if time.time() - array.time > IN_FLIGHT_SECONDS or array.time > time.time():
                array_records.drop(root, array)
                break
            time.sleep(0.5)


def adopted_after_error(name: str) -> str | None:
    """The job that SLURM took although sbatch failed: a lost answer is not a error. None where there is none.

    Raises:
        UserError: SLURM cannot say.
    """
    try:
        return named(name)
    except Unreachable as error:
        raise UserError(
            f"sbatch failed and SLURM cannot say whether it took the job {name}: {error}. "
            "Submit again when it can; nothing will be submitted twice."
        ) from None


def _at_work(array: ArrayRecord) -> bool:
    """Whether the submitter of an array without a job may still be about to get one."""
    if array.host == os.uname().nodename and (array.pid == os.getpid() or not is_alive(array.pid)):
        return False
    return time.time() - array.time < AT_WORK_SECONDS  # a number can have come round to another process
