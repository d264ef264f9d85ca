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
"""Enough for the last two lines of metrics."""


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
    """Write a whole file, or keep the old one: under a temporary name in the same folder, flushed, renamed.

    With `durable` false the file is not flushed to disk. That is a hundred times faster, but a power cut can lose the
    file, so use it only for files that are written again if they are missing.
    """
    if "\0" in str(path):
        raise UserError(
            f"{str(path)!r}: a file name cannot contain a NUL character. Rename what the file is named after."
        )
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
            error.filename, error.filename2 = str(path), None  # write() sets no name, and replace() the temporary one
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary_name(path: Path) -> Path:
    """A unique name in the folder of `path`, because a rename is atomic only within a file system.

    It is random, because process ids are not unique between containers that share a file system.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_json(path: Path, value: msgspec.Struct, *, durable: bool = True) -> None:
    """Write a value as indented JSON with `write_atomic`."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n", durable=durable)


def read_json(path: Path, kind: type[T], *, remedy: str = "Restore it, or name another file.") -> T:
    """The value in a JSON file, checked strictly.

    Args:
        path: The file.
        kind: Type of the value.
        remedy: What to do, the last sentence of the error. Only the caller knows how to write the file again and what
            is lost without it.

    Raises:
        UserError: The file does not exist or is not JSON, or a field is unknown, missing or invalid.
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
    """Append a JSON line; a torn last line, left by a killed writer, is terminated first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(msgspec.json.encode(value) + b"\n")


def write_lines(path: Path, values: Iterable[msgspec.Struct]) -> None:
    """Write a whole JSON-lines file atomically."""
    write_atomic(path, b"".join(msgspec.json.encode(value) + b"\n" for value in values))


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Values of a JSON-lines file without torn and damaged lines; empty if there is no file."""
    decoder = msgspec.json.Decoder(kind)
    values = []
    for line in read_bytes(path).splitlines():
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            values.append(decoder.decode(line))
    return values


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, *, last: int | None = None) -> bytes:
    """The content of a log, or its `last` bytes; empty if there is no file."""
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
