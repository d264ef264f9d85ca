"""Records of submitted arrays, and the marks in run directories that refer to them.

``<root>/submissions/<token>.json`` is written before `sbatch` is called: it holds the array's runs in the order of its
tasks and, once SLURM has answered, its job id. docs/slurm.md describes the marks in a run's directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from scaling.errors import UserError
from scaling.io import Positive, Strict, read_json, write_atomic, write_json
from scaling.run.directory import RunDirectory
from scaling.spec import Placement, RunSpec
from sweeps.slurm.client import CommandError, find_job
from sweeps.slurm.lease import is_alive

FOLDER = "submissions"
JOB_PREFIX = "scaling"
CLAIM = "claim"
BEGAN = "began"
CANCELLED = "cancelled"

SBATCH_SECONDS = 15.0
"""Time in which a call of sbatch whose caller was killed may still reach SLURM."""

SUBMITTER_SECONDS = 600.0
"""Time for which a submitter on another host counts as working; also the longest for any, because process ids are reused."""


class ArrayRecord(Strict, frozen=True):
    """One array of runs."""

    token: str
    name: str
    """Job name, see `job_name`."""
    runs: tuple[str, ...]
    """Run ids; the first `per_task` of them are those of task 0, and so on."""
    code: str
    """Digest of the code that its jobs run."""
    host: str = msgspec.field(default_factory=lambda: os.uname().nodename)
    pid: int = msgspec.field(default_factory=os.getpid)
    """The submitter's."""
    time: float = msgspec.field(default_factory=time.time)
    """When it was written, seconds since the epoch."""
    job: str | None = None
    """SLURM's id; None until it has answered."""
    per_task: Positive = 1
    """Runs that a task trains side by side."""
    after: tuple[str, ...] = ()
    """Jobs that have to succeed before these start."""

    def runs_of(self, task: int) -> tuple[str, ...]:
        """The runs of a task."""
        return self.runs[task * self.per_task : (task + 1) * self.per_task]

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return -(-len(self.runs) // self.per_task)


class Location(Strict, frozen=True):
    """The array and the task that a run was last submitted in."""

    array: ArrayRecord
    index: int

    @property
    def job(self) -> str | None:
        """The task's id, ``<array job>_<index>``."""
        return None if self.array.job is None else f"{self.array.job}_{self.index}"


def job_name(campaign: str, token: str) -> str:
    """Name of an array's job: it tells a user whose job it is, and `reconcile` which record it belongs to."""
    return f"{JOB_PREFIX}-{campaign}-{token}"


def path_of(root: Path, token: str) -> Path:
    """The record's file."""
    return root / FOLDER / f"{token}.json"


def save(root: Path, array: ArrayRecord) -> ArrayRecord:
    """Write or renew a record."""
    (root / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path_of(root, array.token), array)
    return array


def drop(root: Path, array: ArrayRecord) -> None:
    """Delete the record of an array that SLURM never took, and free its runs."""
    for run in array.runs:
        if owner_of(root, run) == array.token:
            (root / "runs" / run / CLAIM).unlink(missing_ok=True)
    for unfinished in (root / "runs").glob(f".{array.token}-*"):
        shutil.rmtree(unfinished)
    path_of(root, array.token).unlink(missing_ok=True)


def all_arrays(root: Path) -> list[ArrayRecord]:
    """Every array that was submitted under a root, oldest first."""
    remedy = "Move it aside; its runs are then known by their own files alone."
    records = [read_json(file, ArrayRecord, remedy=remedy) for file in (root / FOLDER).glob("*.json")]
    return sorted(records, key=lambda array: (array.time, array.token))


def locations(arrays: Iterable[ArrayRecord]) -> dict[str, Location]:
    """Array and task of each run's last submission, by run id."""
    return {
        run: Location(array=array, index=position // array.per_task)
        for array in arrays
        for position, run in enumerate(array.runs)
    }


def note_began(root: Path, run: str, array: ArrayRecord) -> None:
    """Write the mark that the array's job for this run has started."""
    (root / "runs" / run / BEGAN).write_text(array.token)


def began(root: Path, run: str, array: ArrayRecord) -> bool:
    """True if the array's job for this run ever started."""
    return _text(root / "runs" / run / BEGAN) == array.token


def owner_of(root: Path, run: str) -> str | None:
    """Token of the array that has claimed the run; None without a claim."""
    return _text(root / "runs" / run / CLAIM)


def _text(file: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return file.read_text()
    return None


def create_and_claim(root: Path, run: str, token: str, spec: RunSpec, placement: Placement) -> bool:
    """Create the run's directory for an array under another name and rename it into place; False if it exists.

    Nothing is flushed to disk, because a thousand runs are created at once; submitting again writes what a power cut took.
    """
    new = root / "runs" / f".{token}-{run}"
    new.mkdir(mode=0o700)
    directory = RunDirectory(new)
    for file, value in ((directory.spec_file, spec), (directory.placement_file, placement)):
        file.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    (new / CLAIM).write_text(token)
    try:
        new.rename(root / "runs" / run)
    except OSError:
        shutil.rmtree(new)
        return False
    return True


def claim(root: Path, run: str, token: str, *, instead_of: str | None = None) -> bool:
    """Claim an existing run for an array, or from an owner `instead_of` whose job has ended; True if it now owns the run."""
    path = root / "runs" / run / CLAIM
    try:
        with path.open("x") as file:
            file.write(token)
    except FileExistsError:
        owner = _text(path)
        # An array is on disk before its claims, so a claim without a record is left over from an array that was dropped.
        if owner is None or (owner != instead_of and path_of(root, owner).exists()):
            return False
        write_atomic(path, token.encode(), durable=False)
    return True


def adopt(root: Path, array: ArrayRecord) -> str | None:
    """The job that SLURM took for an array although its submitter got no answer, saved in the record; None without one.

    Raises:
        UserError: SLURM was not reached, so it is not known whether it has a job.
    """
    try:
        job = find_job(array.name)
    except CommandError as error:
        raise UserError(
            f"a submission was interrupted, and it is not known whether SLURM has its job {array.name}: {error}. "
            "Submit again when SLURM answers; nothing will be submitted twice."
        ) from None
    if job is not None:
        save(root, msgspec.structs.replace(array, job=job))
    return job


def reconcile(root: Path) -> None:
    """Finish what interrupted submitters started: adopt their jobs, or free their runs if SLURM never got a job."""
    for array in all_arrays(root):
        has_ended = array.host == os.uname().nodename and (array.pid == os.getpid() or not is_alive(array.pid))
        if array.job is not None or (not has_ended and time.time() - array.time < SUBMITTER_SECONDS):
            continue
        while adopt(root, array) is None:
            if time.time() - array.time > SBATCH_SECONDS or array.time > time.time():
                drop(root, array)
                break
            time.sleep(0.5)
