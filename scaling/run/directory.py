"""The run directory: what a run reads and writes, and what its files say about its state.

    runs/<id>/
        spec.json        what was wished for (RunSpec); its hash is the directory's name
        placement.json   where and how it executes (Placement)
        attempts.jsonl   one line when an attempt starts, one when it ends
        metrics.jsonl    one line a logged step; a torn last line is ignored
    dynamics.jsonl   one line a step at which updates and weights were measured, where the spec asks for it
        checkpoint/      resume state, newest kept
        weights.safetensors
        record.json      RunRecord: written last, by the run alone; a run is done when it is there
        lock             held (flock) by the process that trains

State is derived from these files and never stored twice. Whole files are written under a temporary name in the same
folder, flushed to disk and renamed, so a reader sees a complete file or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from scaling.errors import UserError
from scaling.io import TAIL_BYTES, append_line, read_json, read_lines, write_json
from scaling.run.record import Attempt, DynamicsRow, MetricsRow, RunRecord, RunState
from scaling.spec import Placement, RunSpec


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunDirectory:
    """The paths of one run and what its files say."""

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
        """Write spec and placement; a spec that is already there stays, the placement is renewed.

        A thousand runs at once are created with `durable` false: submitting again writes what a power cut took.
        """
        if not self.spec_file.exists():
            write_json(self.spec_file, spec, durable=durable)
        write_json(self.placement_file, placement, durable=durable)

    def spec(self) -> RunSpec:
        """The requested run.

        Raises:
            UserError: The file cannot be read, or its hash is not the directory's name: somebody edited or moved it.
        """
        spec = read_json(self.spec_file, RunSpec)
        if spec.id != self.path.name:
            raise UserError(
                f"{self.spec_file}: its content hashes to {spec.id}, and the directory is called {self.path.name}. "
                "A spec is not edited in place; change the campaign and plan it again."
            )
        return spec

    def placement(self) -> Placement:
        """Where and how the run executes."""
        return read_json(self.placement_file, Placement)

    def record(self) -> RunRecord | None:
        """What came out, or None while the run is not done."""
        return read_json(self.record_file, RunRecord) if self.record_file.exists() else None

    def intact_weights(self, record: RunRecord) -> Path:
        """The weights file, whose content is the one that the run wrote.

        Raises:
            UserError: Its checksum is not the record's.
        """
        if record.weights_sha256 not in (None, found := file_sha256(self.weights_file)):
            raise UserError(
                f"{self.weights_file}: its SHA-256 is {found[:12]}..., and the record says "
                f"{str(record.weights_sha256)[:12]}...: the file was damaged or replaced. Put the right one back, or remove "
                "that run's record.json and train it again."
            )
        return self.weights_file

    def metrics(self) -> list[MetricsRow]:
        """Logged steps in order."""
        return read_lines(self.metrics_file, MetricsRow)

    def dynamics(self) -> list[DynamicsRow]:
        """Measured steps in order; empty where the spec asks for none."""
        return read_lines(self.dynamics_file, DynamicsRow)

    def last_row(self) -> MetricsRow | None:
        """The last whole line of the metrics, without reading the others; None where there is none."""
        try:
            with self.metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(line, type=MetricsRow)
        return None

    def attempts(self) -> list[Attempt]:
        """Starts and ends of all attempts in order."""
        return read_lines(self.attempts_file, Attempt)

    def state(self) -> RunState:
        """The run's state, derived from its files alone."""
        record = self.record()
        if record is not None:
            return record.status
        if self.is_locked():
            return "running"
        attempts = self.attempts()
        if not attempts:
            return "planned"
        return "failed" if attempts[-1].outcome == "failed" else "preempted"

    def is_locked(self) -> bool:
        """Whether a process on this machine holds the run."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR)
        except FileNotFoundError:
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
        """Hold the run while it trains, so that two submitters train it once.

        The kernel drops the lock with the process, however it dies. Good on one machine and on file systems with
        working locks.

        Yields:
            Whether the lock was got; always True with `wait`.
        """
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def note(self, event: Literal["start", "end"], *, step: int, **fields: Any) -> None:
        """Append the start or the end of an attempt."""
        append_line(
            self.attempts_file,
            Attempt(event=event, time=time.time(), host=os.uname().nodename, pid=os.getpid(), step=step, **fields),
        )
