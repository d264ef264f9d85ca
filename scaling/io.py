"""Strict values, and their files: atomic JSON and JSON lines.

A reader sees a whole JSON file or none, and a torn last line of a JSON-lines file is ignored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from scaling.errors import UserError, unknown_name

T = TypeVar("T", bound=msgspec.Struct)

Positive = Annotated[int, msgspec.Meta(gt=0)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]

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
        UserError: The file is missing, is not JSON, has an unknown field, a missing field or a wrong type.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. Plan the campaign again to write it.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a valid {kind.__name__}: {error}. Remove the file and plan again.") from None


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
