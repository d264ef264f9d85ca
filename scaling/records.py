"""The run directory: what a run reads and writes, and what its files say about its state.

    runs/<id>/
        spec.json        the requested run (RunSpec); its hash is the directory's name
        placement.json   where and how it executes (Placement)
        attempts.jsonl   one line when an attempt starts, one when it ends
        metrics.jsonl    one line a logged step; a line that cannot be read is ignored
        dynamics.jsonl   one line a step at which updates and parameters were measured, where the spec asks for it
        checkpoint/      resume state, newest kept
        weights.safetensors
        record.json      RunRecord: written last, by the run alone; a run is done when it is there
        lock             held (flock) by the process that trains

State is derived from these files and never stored twice. Whole files are written under a temporary name in the same
folder, flushed to disk and renamed, so a reader sees a complete file or none. Damage comes from outside: a full disk, a
power cut, a copy into the wrong folder. Reading a damaged file raises a `Refusal`, and the run's state is ``failed``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from scaling.errors import Refusal, os_error_sentence
from scaling.flops import CONVENTIONS
from scaling.spec import NonNegative, Placement, RunSpec, Strict

T = TypeVar("T", bound=msgspec.Struct)
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0.0)]

WRITTEN_BY_SUBMIT = "Submit the campaign with --retry failed, which writes it anew."
SET_RECORD_ASIDE = (
    "rename the file, to record.json.damaged for instance, and submit the campaign again. Nothing else of the run is "
    "lost: it continues from its last checkpoint and writes its record anew."
)

TAIL_BYTES = 4096
"""More than a line of metrics, torn or not."""

RunState = Literal["planned", "queued", "running", "finished", "diverged", "failed", "preempted"]


class MetricsRow(Strict, frozen=True):
    """One logged step. Losses in nats per token; a loss that was not measured, or is not finite, is null."""

    step: NonNegative
    tokens: NonNegative
    flops: NonNegative
    """Convention ``6nd``."""
    train_loss: NonNegativeFloat | None
    """Mean over the steps since the row before."""
    learning_rate: float
    grad_norm: float | None
    """Global norm before clipping, at this step."""
    tokens_per_second: NonNegativeFloat
    mfu: float | None
    """Share of the device's peak, convention ``attention``; null where no peak is known."""
    validation_loss: NonNegativeFloat | None = None
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
    validation_loss: NonNegativeFloat | None
    """Mean over the sampled held-out tokens (`Evaluation.tokens`) after the last step, nats per token."""
    train_loss: NonNegativeFloat | None
    """Mean over the last tenth of the steps, nats per token: fresh batches, not the held-out set."""
    tokens: NonNegative
    """Tokens trained on: whole batches."""
    flops: dict[str, NonNegative]
    """Training FLOPs under every convention of ``scaling.flops.CONVENTIONS``."""
    parameters: dict[str, NonNegative]
    """By part: embedding, blocks, head, norms, total; and activated, the blocks' matrices that one token meets."""
    groups: dict[str, list[str]]
    """Parameter names by the algorithm that updates them."""
    bytes_per_token: float
    """Of the evaluated held-out tokens; bits per byte are loss / ln 2 / this."""
    seconds: NonNegativeFloat
    """Training time of all attempts whose steps were kept, evaluation left out."""
    tokens_per_second: NonNegativeFloat
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
    weights_sha256: str | None = None
    """SHA-256 of weights.safetensors, checked where weights are read; null in records of earlier versions."""

    def __post_init__(self) -> None:
        """Reject a record that no run can have written; msgspec reports a ValueError as a value that is not valid."""
        if self.status == "finished" and self.validation_loss is None:
            raise ValueError("status is finished, and validation_loss is null")
        if missing := sorted(CONVENTIONS.keys() - self.flops.keys()):
            raise ValueError(f"flops has no count under the convention {missing[0]}")


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a whole file, or leave the old one: same folder, flushed, renamed.

    With `durable` false it is not flushed to disk, which is a hundred times quicker, and a power cut can lose it: for
    files that are written again when they are missed.
    """
    if "\0" in str(path):
        raise Refusal(f"{str(path)!r}: a file name cannot hold a NUL character. Rename what the file is named after.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = (
                str(path),
                None,
            )  # write() names no file, and nobody knows the temporary one
        raise
    if durable:
        _sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name that no other process uses, in the folder of `path`: a rename across file systems would not be atomic.

    The process id alone is not enough, because two containers that share a file system can have equal ones.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: msgspec.Struct, *, durable: bool = True) -> None:
    """A value as indented JSON, atomically; see `write_atomic`."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n", durable=durable)


def read_json(path: Path, kind: type[T], *, remedy: str = "Restore it, or name another file.") -> T:
    """A value from a JSON file, strictly.

    Args:
        path: The file.
        kind: The Struct to read.
        remedy: What to do if it cannot be read: a sentence for the end of the error. Only the caller knows what
            writes the file again and what would be lost without it.

    Raises:
        Refusal: The file is missing or is not a file, is not JSON, has an unknown or a missing field, or a value that
            cannot be.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise Refusal(f"{path}: there is no such file. {remedy}") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, Refusal) as error:
        raise Refusal(f"{path}: not a valid {kind.__name__}: {str(error).removesuffix('.')}. {remedy}") from None


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
    """Values of a JSON-lines file, torn and damaged lines left out; empty where there is no file.

    Raises:
        Refusal: It cannot be read at all, or is not a file.
    """
    decoder = msgspec.json.Decoder(kind)
    values = []
    for line in _read_bytes(path).splitlines():
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            values.append(decoder.decode(line))
    return values


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_bytes(path: Path, *, last: int | None = None) -> bytes:
    """The content of a log, or its `last` bytes; empty where there is no file."""
    try:
        with path.open("rb") as file:
            if last is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last))
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise Refusal(
            f"{path}: cannot be read ({error.strerror}). Move it aside and submit the campaign again."
        ) from None


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
        except Refusal:
            write_json(self.spec_file, spec, durable=durable)
        write_json(self.placement_file, placement, durable=durable)

    def spec(self) -> RunSpec:
        """The requested run.

        Raises:
            Refusal: The file cannot be read, or its hash is not the directory's name: somebody edited or moved it.
        """
        spec = read_json(self.spec_file, RunSpec, remedy=WRITTEN_BY_SUBMIT)
        if spec.id != self.path.name:
            raise Refusal(
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
            Refusal: The file cannot be read, or is the record of another run.
        """
        if not os.path.lexists(self.record_file):
            return None
        record = read_json(self.record_file, RunRecord, remedy=f"To repair the run, {SET_RECORD_ASIDE}")
        if record.spec.id != self.path.name:
            raise Refusal(
                f"{self.record_file}: the record of run {record.spec.id}, and the directory is called {self.path.name}. "
                f"If the directory was renamed, rename it back. If the file was copied here, {SET_RECORD_ASIDE}"
            )
        return record

    def intact_weights(self, record: RunRecord) -> Path:
        """The weights file, whose content is the one that the run wrote.

        Raises:
            Refusal: Its checksum is not the record's.
        """
        if record.weights_sha256 not in (None, found := file_sha256(self.weights_file)):
            raise Refusal(
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
        except Refusal:
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
        except Refusal as refusal:
            return str(refusal)
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
            Refusal: The lock cannot be made or opened: it is another user's, or a folder.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Refusal(os_error_sentence(error)) from None
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
