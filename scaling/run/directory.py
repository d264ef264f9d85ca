"""The run directory: what a run reads and writes, and what its files say about its state.

    runs/<id>/
        spec.json        the requested run (RunSpec); its hash is the directory's name
        placement.json   where and how it executes (Placement)
        attempts.jsonl   one line when an attempt starts, one when it ends, one when its SLURM job has exited
        metrics.jsonl    one line a logged step; a line that cannot be read is ignored
        dynamics.jsonl   one line a step at which updates and parameters were measured, where the spec asks for it
        checkpoint/      resume state, newest kept
        weights.safetensors
        record.json      RunRecord: written last, by the run alone; a run is done when it is there
        lock             held (flock) by the process that trains

State is derived from these files and never stored twice. Whole files are written under a temporary name in the same
folder, flushed to disk and renamed, so a reader sees a complete file or none. Damage comes from outside: a full disk, a
power cut, a copy into the wrong folder. Reading a damaged file raises a `UserError`, and the run's state is ``failed``.
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
from scaling.io import TAIL_BYTES, _read_bytes, append_line, file_sha256, read_json, read_lines, write_json
from scaling.run.record import Attempt, DynamicsRow, MetricsRow, RunRecord, RunState
from scaling.spec import Placement, RunSpec

WRITTEN_BY_SUBMIT = "Submit the campaign with --retry failed, which writes it anew."
SET_RECORD_ASIDE = (
    "rename the file, to record.json.damaged for instance, and submit the campaign again. Nothing else of the run is "
    "lost: it continues from its last checkpoint and writes its record anew."
)


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
        """Write spec and placement; a spec that can be read stays, the placement is renewed.

        A thousand runs at once are created with `durable` false: submitting again writes what a power cut took.
        """
        try:
            read_json(self.spec_file, RunSpec)  # an edited one stays: `spec` reports it
        except UserError:
            write_json(self.spec_file, spec, durable=durable)
        write_json(self.placement_file, placement, durable=durable)

    def spec(self) -> RunSpec:
        """The requested run.

        Raises:
            UserError: The file cannot be read, or its hash is not the directory's name: somebody edited or moved it.
        """
        spec = read_json(self.spec_file, RunSpec, remedy=WRITTEN_BY_SUBMIT)
        if spec.id != self.path.name:
            raise UserError(
                f"{self.spec_file}: its content hashes to {spec.id}, and the directory is called {self.path.name}. "
                "A spec is not edited in place: remove it, change the campaign, and submit that."
            )
        return spec

    def placement(self) -> Placement:
        """Where and how the run executes."""
        return read_json(self.placement_file, Placement, remedy=WRITTEN_BY_SUBMIT)

    def record(self) -> RunRecord | None:
        """What came out, or None while the run is not done.

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
        """The weights file, whose content is the one that the run wrote.

        Raises:
            UserError: Its checksum is not the record's.
        """
        if record.weights_sha256 not in (None, found := file_sha256(self.weights_file)):
            raise UserError(
                f"{self.weights_file}: its SHA-256 is {found[:12]}..., and the record says "
                f"{str(record.weights_sha256)[:12]}...: the file was damaged or replaced. Put the right one back, or "
                "move that run's record.json aside and train it again."
            )
        return self.weights_file

    def metrics(self) -> list[MetricsRow]:
        """Logged steps in order."""
        return read_lines(self.metrics_file, MetricsRow)

    def dynamics(self) -> list[DynamicsRow]:
        """Measured steps in order; empty where the spec asks for none."""
        return read_lines(self.dynamics_file, DynamicsRow)

    def last_row(self) -> MetricsRow | None:
        """The last readable line of the metrics, without reading the others; None where there is none."""
        for line in reversed(_read_bytes(self.metrics_file, last=TAIL_BYTES).splitlines()):
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
        """The run's state, derived from its files alone; ``failed`` where they cannot be read."""
        try:
            record = self.record()
            if record is not None:
                return record.status
            if self.is_locked():
                return "running"
            self._refuse_damage()
            attempts = self.attempts()
        except UserError:
            return "failed"
        if not attempts:
            return "planned"
        return "failed" if attempts[-1].outcome == "failed" else "preempted"

    def failure(self) -> str | None:
        """Why the run is in the state ``failed``, in a sentence; None where no reason was recorded."""
        try:
            self.record()
            self._refuse_damage()
            attempts = self.attempts()
        except UserError as error:
            return str(error)
        return attempts[-1].reason if attempts else None

    def _refuse_damage(self) -> None:
        """Refuse a spec or a placement that is there and cannot be used; a run without them was not submitted yet."""
        for file, read in ((self.spec_file, self.spec), (self.placement_file, self.placement)):
            if os.path.lexists(file):
                read()

    def is_locked(self) -> bool:
        """Whether a process on this machine holds the run."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR)
        except OSError:  # no run of ours holds it: there is no lock, or it belongs to another user
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

        Raises:
            UserError: The lock cannot be made or opened: it is another user's, or a folder.
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
        """Append a line to attempts.jsonl."""
        append_line(
            self.attempts_file,
            Attempt(event=event, time=time.time(), host=os.uname().nodename, pid=os.getpid(), step=step, **fields),
        )
