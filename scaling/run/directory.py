"""The run directory: the files of one run, what they contain, and the state that follows from them.

    runs/<id>/               <id> is the hash of spec.json
      written by submit
        spec.json            RunSpec: the requested run
        placement.json       Placement: where and how it executes; replaced by each submission
      written by the process that trains (rank 0)
        attempts.jsonl       Attempt: a line when an attempt starts, when it ends, when its SLURM job exits, at a retry
        metrics.jsonl        MetricsRow: a line per logged step
        dynamics.jsonl       DynamicsRow: a line per measured step, if the spec requests measurements
        log.txt              output of the process, of all attempts
        attention.txt        attention kernel that was measured to be fastest on the GPU, kept when the run resumes
        checkpoint/          step-*.ckpt: the newest two; branch-*.ckpt: where branches start
        weights.safetensors  final weights
        record.json          RunRecord: the result. Written last; a run is done if and only if it exists
        lock                 locked with flock while a process trains the run
      written by the local executor
        diverged-<n>.json    record of a divergence, set aside by submit --retry diverged
      written under SLURM (sweeps/slurm)
        claim                token of the submitted array that owns the run
        began                token of the array whose job last started the run
        lease.json           job that trains the run, renewed while it does; reaches nodes that flock does not
        cancelled            exists if a person cancelled the run

The state is derived from these files and never stored. Whole files are written under a temporary name in the same
folder, flushed to disk and renamed, so readers see a complete file or none; a JSON line that cannot be read is ignored.
Damage comes from outside: a full disk, a power cut, a copy into the wrong folder. Reading a damaged file raises a
`UserError`, and the state of the run is ``failed``. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from scaling.errors import UserError, os_error_sentence
from scaling.io import TAIL_BYTES, append_line, file_sha256, read_bytes, read_json, read_lines, write_json
from scaling.run.record import Attempt, DynamicsRow, MetricsRow, RunRecord, RunState
from scaling.spec import Placement, RunSpec

LOG = "log.txt"

SUBMIT_AGAIN = "Submit the campaign with --retry failed, which writes the file again."
SET_RECORD_ASIDE = (
    "rename the file, for instance to record.json.damaged, and submit the campaign again. Nothing else of the run is "
    "lost: it continues from its last checkpoint and writes its record again."
)


class RunDirectory:
    """Paths, contents and state of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec_file = self.path / "spec.json"
        self.placement_file = self.path / "placement.json"
        self.attempts_file = self.path / "attempts.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.dynamics_file = self.path / "dynamics.jsonl"
        self.checkpoints = self.path / "checkpoint"
        self.weights_file = self.path / "weights.safetensors"
        self.record_file = self.path / "record.json"
        self.lock_file = self.path / "lock"

    def create(self, spec: RunSpec, placement: Placement, *, durable: bool = True) -> None:
        """Write spec and placement. A readable spec is kept, the placement is replaced.

        Args:
            spec: The requested run.
            placement: Where and how it executes.
            durable: Flush to disk. False is faster for many runs; after a power cut, submitting again writes the files.
        """
        try:
            read_json(self.spec_file, RunSpec)  # an edited spec is kept, and `spec` reports it
        except UserError:
            write_json(self.spec_file, spec, durable=durable)
        write_json(self.placement_file, placement, durable=durable)

    def spec(self) -> RunSpec:
        """The requested run.

        Raises:
            UserError: The file cannot be read, or its hash is not the directory's name because it was edited or moved.
        """
        spec = read_json(self.spec_file, RunSpec, remedy=SUBMIT_AGAIN)
        if spec.id != self.path.name:
            raise UserError(
                f"{self.spec_file}: its content hashes to {spec.id}, and the directory is called {self.path.name}. "
                "A spec is not edited in place: remove the file, change the campaign, and submit the campaign."
            )
        return spec

    def placement(self) -> Placement:
        """The run's placement."""
        return read_json(self.placement_file, Placement, remedy=SUBMIT_AGAIN)

    def record(self) -> RunRecord | None:
        """The result; None until the run is done.

        Raises:
            UserError: The file cannot be read, or is the record of another run.
        """
        if not os.path.lexists(self.record_file):
            return None
        record = read_json(self.record_file, RunRecord, remedy=f"To repair the run, {SET_RECORD_ASIDE}")
        if record.spec.id != self.path.name:
            raise UserError(
                f"{self.record_file}: the record of run {record.spec.id}, and the directory is called {self.path.name}. "
                f"If the directory was renamed, rename it back. If the file was copied here, {SET_RECORD_ASIDE}"
            )
        return record

    def intact_weights(self, record: RunRecord) -> Path:
        """The weights file, after its checksum was compared with the record's."""
        if record.weights_sha256 not in (None, found := file_sha256(self.weights_file)):
            raise UserError(
                f"{self.weights_file}: its SHA-256 is {found[:12]}..., and the record says "
                f"{str(record.weights_sha256)[:12]}...: the file was damaged or replaced. Restore it, or "
                "rename the run's record.json and train the run again."
            )
        return self.weights_file

    def metrics(self) -> list[MetricsRow]:
        """Logged steps in order."""
        return read_lines(self.metrics_file, MetricsRow)

    def dynamics(self) -> list[DynamicsRow]:
        """Measured steps in order; empty if the spec requests none."""
        return read_lines(self.dynamics_file, DynamicsRow)

    def last_row(self) -> MetricsRow | None:
        """The last readable line of the metrics, found without reading the others; None if there is none."""
        for line in reversed(read_bytes(self.metrics_file, last=TAIL_BYTES).splitlines()):
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                return msgspec.json.decode(line, type=MetricsRow)
        return None

    def attempts(self) -> list[Attempt]:
        """Starts and ends of all attempts in order."""
        return [line for line in self.history() if line.event in ("start", "end")]

    def history(self) -> list[Attempt]:
        """All lines of attempts.jsonl: `attempts` with the exits of SLURM jobs and the retries between them."""
        return read_lines(self.attempts_file, Attempt)

    def state(self) -> RunState:
        """The state of the run by its files; ``failed`` if they cannot be read. Never ``queued``, see `RunState`."""
        try:
            record = self.record()
            if record is not None:
                return record.status
            if self.is_locked():
                return "running"
            self._check_files()
            attempts = self.attempts()
        except UserError:
            return "failed"
        if not attempts:
            return "planned"
        return "failed" if attempts[-1].outcome == "failed" else "preempted"

    def failure(self) -> str | None:
        """Why the run is in the state ``failed``, as a sentence; None if no reason was recorded."""
        try:
            self.record()
            self._check_files()
            attempts = self.attempts()
        except UserError as error:
            return str(error)
        return attempts[-1].reason if attempts else None

    def _check_files(self) -> None:
        """Raise if spec or placement exists and cannot be used. A run without them has not been submitted yet."""
        for file, read in ((self.spec_file, self.spec), (self.placement_file, self.placement)):
            if os.path.lexists(file):
                read()

    def is_locked(self) -> bool:
        """True if a process on this machine trains the run."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR)
        except OSError:  # there is no lock, or it belongs to another user: no process of this user trains the run
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @contextlib.contextmanager
    def claim(self, *, wait: bool = True) -> Iterator[bool]:
        """Context that locks the run, so that concurrent submitters train it once.

        The kernel releases the lock when the process ends, however it ends. The lock works on one machine, and on file
        systems that support flock across machines.

        Args:
            wait: Wait until another process releases the lock.

        Yields:
            True if the lock was acquired, which is certain with `wait`.

        Raises:
            UserError: The lock file cannot be created or opened: it belongs to another user, or is a folder.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(os_error_sentence(error)) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def note(self, event: Literal["start", "end", "exit", "retry"], *, step: int, **fields: Any) -> None:
        """Append a line to attempts.jsonl; `fields` are further ones of `Attempt`."""
        append_line(
            self.attempts_file,
            Attempt(event=event, time=time.time(), host=os.uname().nodename, pid=os.getpid(), step=step, **fields),
        )


def finished_run(directory: RunDirectory, *, purpose: str, weights: bool = True) -> RunRecord:
    """The record of a finished run.

    Args:
        directory: The run.
        purpose: What needs it, as the subject of a sentence: ``evaluation``.
        weights: Also require the weights file.

    Raises:
        UserError: There is no such directory, the run has not finished, or its weights are missing.
    """
    if not directory.path.is_dir():
        raise UserError(
            f"run {directory.path}: there is no such directory, and {purpose} needs a finished run. "
            "Give one of the directories under runs/."
        )
    record = directory.record()
    if record is None:
        raise UserError(
            f"run {directory.path}: its state is {directory.state()}, and {purpose} needs a finished run. "
            "Train it to its end first, with scaling submit or scaling train."
        )
    if record.status != "finished":
        raise UserError(
            f"run {directory.path}: it {record.status} ({record.reason}), and {purpose} needs a finished run. "
            "Choose another run."
        )
    if weights and not directory.weights_file.exists():
        raise UserError(
            f"{directory.weights_file}: the weights are gone, and {purpose} needs them. "
            "Restore the file, or rename the run's record.json and submit the campaign again."
        )
    return record
