"""A TOML file as a strict value, or a sentence that says where it is wrong and what would be right."""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from scaling.errors import ConfigError, UserError

T = TypeVar("T", bound=msgspec.Struct)

LARGEST_FILE = 1 << 20
"""Bytes; a campaign is written by a person."""

COUNT = re.compile(r"Expected `int(?: \| null)?`, got `float`")
STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+|\.\.\.)\]")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: The file is missing, too large, or not TOML.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a campaign file.") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(
            f"{path}: {len(content):,} bytes is no campaign file; it would have fewer than {LARGEST_FILE:,}."
        )
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}. Fix that place; strings need quotes, tables [brackets]."
        ) from None


def override(tables: dict[str, Any], setting: str) -> None:
    """Put ``table.key=value`` in place of what the tables say; the value is TOML, or a word that stands for itself.

    Raises:
        ConfigError: It is not of that form, or leads through a value that is no table.
    """
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
        raise ConfigError(f'"{setting}" sets nothing. Write TABLE.KEY=VALUE, such as placement.threads=2.')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    here = tables
    for step in path:
        here = here.setdefault(step, {})
        if not isinstance(here, dict):
            raise ConfigError(f'"{setting}": {step} is no table of the campaign, so nothing in it can be set.')
    here[last] = value


def as_value(tables: Any, kind: type[T], *, where: str) -> T:
    """Tables as a strict value.

    Args:
        tables: What `read_toml` gave, or a part of it.
        kind: The Struct to make.
        where: File, and table where `tables` is a part, for the sentence.

    Raises:
        ConfigError: An unknown key (with its nearest neighbour), a missing one, a wrong type or an impossible value.
    """
    try:
        with located(where):
            return msgspec.convert(tables, type=kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}{_explain(str(error), tables, kind)}") from None


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place in front of a error that does not know it."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(message: str, tables: Any, kind: type[msgspec.Struct]) -> str:
    problem, _, at = message.partition(" - at `$")
    steps = _steps(at.rstrip("`"))
    unknown = re.search(r"unknown field `(.*)`", problem)
    missing = re.search(r"missing required field `(.*)`", problem)
    if unknown or missing:
        known = _fields(kind, steps)
        place = _place(tables, steps)
        if unknown:
            name = unknown[1]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            return f'{place}: field "{name}" is not known; {hint}Known: {", ".join(known)}.'
        assert missing is not None
        near = difflib.get_close_matches(missing[1], [k for k in _found(tables, steps) if k not in known], n=1)
        hint = f' ("{near[0]}" is there, and is not known)' if near else ""
        return f'{place}: field "{missing[1]}" is missing{hint}. Add it: {missing[1]} = ...'
    value = _walk(tables, steps)
    place = _place(tables, steps[:-1])
    field = str(steps[-1]) if steps and isinstance(steps[-1], str) else "value"
    if steps and isinstance(steps[-1], int):
        place, field = _place(tables, steps[:-2]), f"{steps[-2]}, entry {steps[-1] + 1}"
    if COUNT.search(problem) and isinstance(value, float) and value == int(value):
        return (
            f"{place}: {field} is {value!r}, which TOML reads as a fraction, and a count is wanted. "
            f"Write it in full: {int(value):_}."
        )
    return f"{place}: {field} is {value!r}. {_wanted(problem, _words(kind, steps))}"


def _wanted(problem: str, words: list[str]) -> str:
    """What would be accepted, from msgspec's sentence and the words that the field may hold."""
    plain = problem.replace("`", "").replace("object", "table").replace("array", "list").replace("null", "nothing")
    if "matching regex" in plain:
        return "Use letters, digits, dot, underscore and hyphen, and begin with a letter or digit."
    if "Invalid enum value" in plain:
        return f"Write one of {', '.join(words)}."
    return f"{plain.removesuffix('.')}. Change the value."


def _steps(path: str) -> list[str | int]:
    return [
        name or (int(number) if number.isdigit() else "...") for name, number in STEP.findall(path)
    ]  # a key of a free table reads [...]


def _walk(tables: Any, steps: list[str | int]) -> Any:
    for step in steps:
        try:
            tables = tables[step]
        except (KeyError, IndexError, TypeError):
            return "..."
    return tables


def _found(tables: Any, steps: list[str | int]) -> list[str]:
    table = _walk(tables, steps)
    return list(table) if isinstance(table, dict) else []


def _place(tables: Any, steps: list[str | int]) -> str:
    """The table as it is written in the file: ``, [[rungs]] number 2 ("83k")``."""
    if not steps:
        return ""
    names = [str(step) for step in steps if isinstance(step, str)]
    if isinstance(steps[-1], int):
        name = _walk(tables, [*steps, "name"])
        called = f' ("{name}")' if isinstance(name, str) and name != "..." else ""
        return f", [[{'.'.join(names)}]] number {steps[-1] + 1}{called}"
    return f", [{'.'.join(names)}]"


def _fields(kind: type[msgspec.Struct], steps: list[str | int]) -> list[str]:
    """Names of the fields of the Struct that a path leads to."""
    struct = _struct(_type_at(kind, steps))
    return sorted(field.encode_name for field in struct.fields) if struct else []


def _words(kind: type[msgspec.Struct], steps: list[str | int]) -> list[str]:
    """Words that the field at the end of a path may hold."""
    found = _type_at(kind, steps)
    parts = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [f'"{word}"' for part in parts if isinstance(part, inspect.LiteralType) for word in part.values]


def _type_at(kind: type[msgspec.Struct], steps: list[str | int]) -> inspect.Type:
    current: inspect.Type = inspect.type_info(kind)
    for step in steps:
        struct = _struct(current)
        if isinstance(step, str) and struct is not None:
            current = next((field.type for field in struct.fields if field.encode_name == step), current)
    return current


def _struct(found: inspect.Type) -> inspect.StructType | None:
    if isinstance(found, inspect.StructType):
        return found
    if isinstance(found, inspect.UnionType):
        return next((struct for part in found.types if (struct := _struct(part))), None)
    if isinstance(found, inspect.VarTupleType):
        return _struct(found.item_type)
    if isinstance(found, inspect.DictType):
        return _struct(found.value_type)
    return None
