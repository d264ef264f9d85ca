"""What was handed to SLURM, written down before it was handed over.

One file for each array, ``<root>/submissions/<token>.json``: which runs it holds, in the order of its tasks, and, once
SLURM has answered, its job id. A submitter that dies in between leaves a file without a job id, and the next one looks
for a job of that name. In each run's directory a claim names the token, created exclusively, so that no two arrays hold
one run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from scaling.io import Positive, Strict, read_json, write_atomic, write_json
from scaling.run.directory import RunDirectory
from scaling.spec import Placement, RunSpec

FOLDER = "submissions"
CLAIM = "claim"
CANCELLED = "cancelled"
"""Empty file in the directory of a run that a person cancelled through `sweeps.slurm.operations`: SLURM forgets, the run does not."""


BEGAN = "began"
"""File in a run's directory with the token of the array whose job last began it."""


class ArrayRecord(Strict, frozen=True):
    """One array of runs."""

    token: str
    name: str
    """Its job name: campaign and token."""
    runs: tuple[str, ...]
    """Run ids; the first `per_task` of them are those of task 0, and so on."""
    code: str
    """Digest of the code that its jobs are to run."""
    host: str
    pid: int
    """Of the submitter."""
    time: float
    """When it was written, seconds since the epoch."""
    job: str | None = None
    """SLURM's id; None until it has answered."""
    per_task: Positive = 1
    """Runs that a task trains side by side."""
    after: tuple[str, ...] = ()
    """Jobs that had to end well before these could start."""

    def runs_of(self, task: int) -> tuple[str, ...]:
        """The runs of a task."""
        return self.runs[task * self.per_task : (task + 1) * self.per_task]

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return -(-len(self.runs) // self.per_task)


class Location(Strict, frozen=True):
    """Where a run was last handed to."""

    array: ArrayRecord
    index: int
    """Of the task."""

    @property
    def job(self) -> str | None:
        """The task's id, ``<array job>_<index>``."""
        return None if self.array.job is None else f"{self.array.job}_{self.index}"


def new_array(
    root: Path,
    *,
    token: str,
    name: str,
    runs: Iterable[str],
    code: str,
    per_task: int = 1,
    after: Iterable[str] = (),
) -> ArrayRecord:
    """A record on disk for an array that is about to be submitted."""
    array = ArrayRecord(
        token=token,
        name=name,
        runs=tuple(runs),
        code=code,
        host=os.uname().nodename,
        pid=os.getpid(),
        time=time.time(),
        per_task=per_task,
        after=tuple(after),
    )
    save(root, array)
    return array


def path_of(root: Path, array: ArrayRecord) -> Path:
    """The record's file."""
    return root / FOLDER / f"{array.token}.json"


def save(root: Path, array: ArrayRecord) -> None:
    """Write or renew a record."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path_of(root, array), array)


def with_job(root: Path, array: ArrayRecord, job: str) -> ArrayRecord:
    """The record with SLURM's answer, saved."""
    array = msgspec.structs.replace(array, job=job)
    save(root, array)
    return array


def drop(root: Path, array: ArrayRecord) -> None:
    """Forget an array that SLURM never took, and free its runs."""
    for run in array.runs:
        claim = root / "runs" / run / CLAIM
        with contextlib.suppress(FileNotFoundError):
            if claim.read_text() == array.token:
                claim.unlink()
    for unfinished in (root / "runs").glob(f".{array.token}-*"):
        shutil.rmtree(unfinished)
    path_of(root, array).unlink(missing_ok=True)


def all_arrays(root: Path) -> list[ArrayRecord]:
    """Everything that was ever submitted under a root, oldest first."""
    remedy = "Move it aside; its runs are then known by their own files alone."
    records = [read_json(file, ArrayRecord, remedy=remedy) for file in (root / FOLDER).glob("*.json")]
    return sorted(records, key=lambda array: (array.time, array.token))


def locations(arrays: Iterable[ArrayRecord]) -> dict[str, Location]:
    """Where each run was last handed to, by run id."""
    return {
        run: Location(array=array, index=place // array.per_task)
        for array in arrays
        for place, run in enumerate(array.runs)
    }


def note_began(root: Path, run: str, array: ArrayRecord) -> None:
    """Say in the run's directory that the array's job for it has begun."""
    (root / "runs" / run / BEGAN).write_text(array.token)


def began(root: Path, run: str, array: ArrayRecord) -> bool:
    """Whether the array's job for this run ever began."""
    with contextlib.suppress(FileNotFoundError):
        return (root / "runs" / run / BEGAN).read_text() == array.token
    return False


def create_and_claim(root: Path, run: str, token: str, spec: RunSpec, placement: Placement) -> bool:
    """Whether this array made the run's directory and so owns it; False if the directory is there.

    The directory gets its name when it is complete: a reader sees a whole run or none, and of two submitters one wins.
    Nothing is flushed to disk, for a thousand runs are made at once; submitting again writes what a power cut took.
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


def owner_of(root: Path, run: str) -> str | None:
    """Token of the array that has claimed the run; None where nobody has."""
    try:
        return (root / "runs" / run / CLAIM).read_text()
    except FileNotFoundError:
        return None


def claim(root: Path, run: str, token: str, *, instead_of: str | None = None) -> bool:
    """Whether this array now owns the run.

    Args:
        root: The run root.
        run: Run id; its directory exists.
        token: The new owner.
        instead_of: An owner whose job is known to be over.
    """
    path = root / "runs" / run / CLAIM
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            owner = path.read_text()
            # An array is on disk before its claims, so a claim without one is left over from an array that was dropped.
            if owner == instead_of or not (root / FOLDER / f"{owner}.json").exists():
                write_atomic(path, token.encode(), durable=False)
                return True
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    return True
