"""Strict values, and their files: atomic JSON and JSON lines.

A reader sees a whole JSON file or none, and a torn last line of a JSON-lines file is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from scaling.errors import UserError, unknown_name

T = TypeVar("T", bound=msgspec.Struct)

# Number types of every file. All are finite and bounded: an unbounded count makes loops and lists of that length, and JSON
# has no spelling for inf and nan. Each bound lies far above any experiment.
MAX_COUNT = 10**15
MAX_NUMBER = 1e30
Positive = Annotated[int, msgspec.Meta(gt=0, le=MAX_COUNT)]
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Small = Annotated[int, msgspec.Meta(gt=0, le=1000)]
"""A count of devices, processes, threads or repetitions."""
Size = Annotated[int, msgspec.Meta(gt=0, le=2**20)]
"""A dimension of a model: width, vocabulary, context, experts."""
Layers = Annotated[int, msgspec.Meta(gt=0, le=2**10)]
BatchTokens = Annotated[int, msgspec.Meta(gt=0, le=2**32)]
Sequences = Annotated[int, msgspec.Meta(gt=0, le=2**20)]
"""Sequences of one forward pass."""
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0, le=MAX_NUMBER)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_NUMBER)]
Finite = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Line = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z", max_length=1000)]
"""Text without control characters: one line that a terminal shows as it is."""

TAIL_BYTES = 4096
"""More than a line of metrics, torn or not."""


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of every value that is written to a file."""


def typed_options(values: Mapping[str, Any], kind: type[T], *, owner: str) -> T:
    """Options of an optimizer or a model family as the type of its row, defaults filled in.

    Raises:
        UserError: An option is not known, or a value has the wrong type or range.
    """
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise UserError(unknown_name(f"option of {owner}", name, known))
        try:
            msgspec.convert(value, type=known[name].type)
        except msgspec.ValidationError as error:
            raise UserError(
                f"option {name} of {owner} is {value!r}: {error}. Its default is {known[name].default!r}."
            ) from None
    return msgspec.convert(dict(values), type=kind)


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a whole file, or leave the old one: same folder, flushed, renamed.

    With `durable` false it is not flushed to disk, which is a hundred times quicker, and a power cut can lose it: for
    files that are written again when they are missed.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: a file name cannot hold a NUL character. Rename what the file is named after.")
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
        UserError: The file is missing or is not a file, is not JSON, has an unknown or a missing field, or a value that
            cannot be.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{path}: not a valid {kind.__name__}: {str(error).removesuffix('.')}. {remedy}") from None


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
        UserError: It cannot be read at all, or is not a file.
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
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Move it aside and submit the campaign again."
        ) from None
