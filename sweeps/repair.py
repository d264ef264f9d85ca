"""What a submitter that was killed half-way has left, put right by the next one from SLURM's queue."""

from __future__ import annotations

import os
import time
from pathlib import Path

from scaling.errors import Refusal
from sweeps import arrays
from sweeps.arrays import ArrayRecord
from sweeps.lease import is_alive
from sweeps.slurm import Unreachable, named

IN_FLIGHT_SECONDS = 15.0
"""How long a call of sbatch whose caller was killed may still reach SLURM."""

AT_WORK_SECONDS = 600.0
"""How long a submitter on another host, whom nobody here can see, is taken to be at work; and the most for any."""


def repair(root: Path) -> None:
    """Finish what killed submitters began: adopt their jobs, or free their runs where SLURM never got one.

    Raises:
        Refusal: SLURM cannot say whether it got a job.
    """
    for array in arrays.all_arrays(root):
        if array.job is not None or _at_work(array):
            continue
        while True:
            try:
                job = named(array.name)
            except Unreachable as error:
                raise Refusal(
                    f"an earlier submission was interrupted, and SLURM cannot say whether it got it: {error}. "
                    "Submit again when it can."
                ) from None
            if job is not None:
                arrays.with_job(root, array, job)
                break
            if time.time() - array.time > IN_FLIGHT_SECONDS or array.time > time.time():
                arrays.drop(root, array)
                break
            time.sleep(0.5)


def adopted_after_error(name: str) -> str | None:
    """The job that SLURM took although sbatch failed: a lost answer is not a refusal. None where there is none.

    Raises:
        Refusal: SLURM cannot say.
    """
    try:
        return named(name)
    except Unreachable as error:
        raise Refusal(
            f"sbatch failed and SLURM cannot say whether it took the job {name}: {error}. "
            "Submit again when it can; nothing will be submitted twice."
        ) from None


def _at_work(array: ArrayRecord) -> bool:
    """Whether the submitter of an array without a job may still be about to get one."""
    if array.host == os.uname().nodename and (array.pid == os.getpid() or not is_alive(array.pid)):
        return False
    return time.time() - array.time < AT_WORK_SECONDS  # a number can have come round to another process
