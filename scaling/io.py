"""Atomic JSON files and JSON lines: a reader sees a whole file or none, and a torn last line is ignored."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from scaling.errors import UserError

T = TypeVar("T", bound=msgspec.Struct)

TAIL_BYTES = 4096
"""Enough for the last two lines of metrics."""


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
        _sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A unique name in the folder of `path`, because a rename is atomic only within a file system.

    It is random, because process ids are not unique between containers that share a file system.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Values of a JSON-lines file without torn and damaged lines; empty if there is no file.

    Raises:
        UserError: The file cannot be read, or is not a file.
    """
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
