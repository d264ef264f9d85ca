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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from scaling.errors import Refusal
from scaling.spec import Placement, RunSpec, Strict

T = TypeVar("T", bound=msgspec.Struct)

TAIL_BYTES = 4096
"""More than a line of metrics, torn or not."""

RunState = Literal["planned", "queued", "running", "finished", "diverged", "failed", "preempted"]


class MetricsRow(Strict, frozen=True):
    """One logged step. Losses in nats per token; a loss that was not measured, or is not finite, is null."""

    step: int
    tokens: int
    flops: int
    """Convention ``6nd``."""
    train_loss: float | None
    """Mean over the steps since the row before."""
    learning_rate: float
    grad_norm: float | None
    """Global norm before clipping, at this step."""
    tokens_per_second: float
    mfu: float | None
    """Share of the device's peak, convention ``attention``; null where no peak is known."""
    validation_loss: float | None = None
    load_imbalance: float | None = None
    """With experts: load of the busiest over the mean, in the worst layer of this step; no token is ever dropped."""


class DynamicsRow(Strict, frozen=True):
    """What one step did to the weights, and what they are after it; by class of matrix, which layers share."""

    step: int
    tokens: int
    update_rms: dict[str, float]
    """Root mean square of the step's update in units of the learning rate, decay left out; by class of parameter."""
    largest_logit: dict[str, float]
    """Largest attention logit of any head over the first held-out windows, after the step; by attention."""
    svd_entropy: dict[str, float]
    """``-sum p log p / log n`` of a matrix's squared singular values over their sum, mean over a class (Moonlight,
    Section 3.4): 1 where all are equal."""
    clipped_heads: int | None = None
    """Heads that QK-clip has shrunk so far, counted once a step; null without it."""


class Attempt(Strict, frozen=True):
    """One line of attempts.jsonl."""

    event: Literal["start", "end"]
    time: float
    """Seconds since the epoch."""
    host: str
    pid: int
    step: int
    """Optimizer step that the attempt started from, or had reached."""
    outcome: Literal["finished", "diverged", "failed", "preempted"] | None = None
    reason: str | None = None
    """Why it failed, in a sentence."""
    job: str | None = None
    """Scheduler's job id where there was one."""


class Device(Strict, frozen=True):
    """What a run ran on."""

    name: str
    kind: str
    count: int = 1
    peak_flops: float | None = None
    """Dense peak of one device at the run's precision, in FLOP/s; null where unknown."""


class Code(Strict, frozen=True):
    """Which code ran: commit and whether the tree had uncommitted changes; null where there was no checkout."""

    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    """Python and the libraries whose numbers reach the result."""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Hashes of the source files that decide a run's numbers (`scaling.provenance.code_hashes`), by path."""

    @property
    def digest(self) -> str | None:
        """One hash over `files`; None where none were recorded."""
        text = "".join(f"{name} {self.files[name]}\n" for name in sorted(self.files))
        return hashlib.sha256(text.encode()).hexdigest()[:12] if text else None


class RunRecord(Strict, frozen=True):
    """What a run was and what came out; the centre of everything that is analysed later.

    A diverged run has `validation_loss` null and status ``diverged``: never NaN.
    """

    spec: RunSpec
    status: Literal["finished", "diverged"]
    validation_loss: float | None
    """Mean over the fixed held-out windows at the last token, nats per token."""
    train_loss: float | None
    """Mean over the last tenth of the steps, nats per token: fresh batches, not the held-out set."""
    tokens: int
    """Tokens trained on: whole batches."""
    flops: dict[str, int]
    """Training FLOPs under every convention of ``scaling.flops.CONVENTIONS``."""
    parameters: dict[str, int]
    """By part: embedding, blocks, head, norms, total; and activated, the blocks' matrices that one token meets."""
    groups: dict[str, list[str]]
    """Parameter names by the algorithm that updates them."""
    bytes_per_token: float
    """Of the held-out text; bits per byte are loss / ln 2 / this."""
    seconds: float
    """Training time of all attempts whose steps were kept, evaluation left out."""
    tokens_per_second: float
    mfu: float | None
    device: Device
    code: Code
    manifest: str
    """SHA-256 of the data manifest that was read."""
    attempts: int
    finished_at: float
    reason: str | None = None
    """Why a run ended early: the step and the loss at which it diverged."""
    initial_flops: dict[str, int] = msgspec.field(default_factory=dict)
    """What `flops` includes for the run whose weights this one started from; empty where nothing was charged."""
    peak_memory: int | None = None
    """Most bytes that the last attempt held in one process: on a GPU of tensors, on a CPU of everything."""
    optimizer_seconds: float | None = None
    """Clipping and optimizer step, mean over the steps that were timed in the last attempt."""
    attention: str | None = None
    """Torch's attention kernel by name, where one was chosen; null leaves the choice to torch."""
    optimizer_flops: int | None = None
    """Of all optimizer steps, their matrix products alone (`scaling.optim.ledger`); in no row of `flops`."""
    cpu_seconds: float | None = None
    """What `seconds` cost the processors, all threads of the run's first process: on a CPU the clock to trust where
    others shared the machine."""


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a whole file, or leave the old one: same folder, flushed, renamed.

    A move across file systems would truncate the old file in place, so the temporary name lives beside the final one.
    With `durable` false it is not flushed to disk, which is a hundred times quicker, and a power cut can lose it: for
    files that are written again when they are missed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: msgspec.Struct, *, durable: bool = True) -> None:
    """A value as indented JSON, atomically; see `write_atomic`."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n", durable=durable)


def read_json(path: Path, kind: type[T]) -> T:
    """A value from a JSON file, strictly.

    Raises:
        Refusal: The file is missing, is not JSON, has an unknown field, a missing field or a wrong type.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise Refusal(f"{path}: there is no such file. Plan the campaign again to write it.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not a valid {kind.__name__}: {error}. Remove the file and plan again.") from None


def append_line(path: Path, value: msgspec.Struct) -> None:
    """One JSON line at the end of a file; a torn last line of a killed writer is closed first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(msgspec.json.encode(value) + b"\n")


def write_lines(path: Path, values: Iterable[msgspec.Struct]) -> None:
    """A whole JSON-lines file, atomically."""
    write_atomic(path, b"".join(msgspec.json.encode(value) + b"\n" for value in values))


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Values of a JSON-lines file, torn lines left out; empty where there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    values = []
    decoder = msgspec.json.Decoder(kind)
    for line in content.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            values.append(decoder.decode(line))
    return values


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
        """The wished-for run.

        Raises:
            Refusal: The file cannot be read, or its hash is not the directory's name: somebody edited or moved it.
        """
        spec = read_json(self.spec_file, RunSpec)
        if spec.id != self.path.name:
            raise Refusal(
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
