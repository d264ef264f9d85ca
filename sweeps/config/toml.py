"""A TOML file as a strict value, or a sentence that says where it is wrong and what would be right."""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from scaling.errors import CONTROL, ConfigError, UserError, plain, shortened

T = TypeVar("T", bound=msgspec.Struct)

LARGEST_FILE = 1 << 20
"""Bytes; a campaign is written by a person."""

LONGEST_TEXT = 1000
"""Characters of a key or a string."""

DEEPEST = 20
"""Tables inside tables. `tomllib` takes time quadratic in the parts of a dotted key, so those are counted before."""

DOTTED = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){{{DEEPEST},}}""")

MOST_PROBLEMS = 10
"""Problems of one file that are reported together."""

MOST_TRIED = 100
"""Keys of a free table that are tried one by one to find the wrong one."""

COUNT = re.compile(r"Expected `int(?: \| null)?`, got `float`")
STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+|\.\.\.)\]")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: The file is missing, too large, or not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shortened(str(path))}: cannot be read ({why}). Give the path of a TOML file.") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path}: the file is larger than {LARGEST_FILE:,} bytes. Give the path of a campaign file.")
    try:
        tables = _parsed(content.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not valid TOML: {shortened(str(error), 200)}. "
            "Correct that place; strings need quotes, tables [brackets]."
        ) from None
    _check_scalars(tables, path.name)
    return tables


def _parsed(text: str) -> dict[str, Any]:
    """TOML as tables.

    Raises:
        ValueError: It is not TOML, or a key has too many parts.
        RecursionError: Lists or inline tables are nested too deeply.
    """
    if found := DOTTED.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"a key of more than {DEEPEST} parts (line {line})")
    return tomllib.loads(text)


def override(tables: dict[str, Any], setting: str) -> None:
    """Put ``table.key=value`` in place of what the tables say; the value is TOML, or a word that stands for itself.

    Raises:
        ConfigError: It is not of that form, or leads through a value that is no table.
    """
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
        raise ConfigError(f'"{shortened(setting)}" sets nothing. Write TABLE.KEY=VALUE, such as placement.threads=2.')
    try:
        value = _parsed(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    _check_scalars(value, f"--set {shortened(setting)}", key)
    *path, last = key.split(".")
    if len(path) >= DEEPEST:
        raise ConfigError(f'"{shortened(setting)}" leads through more than {DEEPEST} tables. Write TABLE.KEY=VALUE.')
    here = tables
    for step in path:
        here = here.setdefault(step, {})
        if not isinstance(here, dict):
            raise ConfigError(
                f'"{shortened(setting)}": {step} is no table of the campaign, so nothing in it can be set.'
            )
    here[last] = value


def as_value(tables: Any, kind: type[T], *, where: str, file: type[msgspec.Struct] | None = None) -> T:
    """Tables as a strict value.

    Args:
        tables: What `read_toml` gave, or a part of it.
        kind: The Struct to make.
        where: File, and table where `tables` is a part, for the sentence.
        file: The Struct of the whole file, where `kind` is of a part of it.

    Raises:
        ConfigError: Unknown keys (each with its nearest neighbour), missing ones, wrong types and impossible values: a
            line for each, up to `MOST_PROBLEMS`.
    """
    left = copy.deepcopy(tables)
    problems: list[str] = []
    replaced: list[tuple[list[str | int], str | int]] = []
    while len(problems) < MOST_PROBLEMS:
        try:
            with located(where):
                value = msgspec.convert(left, type=kind)
        except msgspec.ValidationError as error:
            problem, _, at = str(error).partition(" - at `$")
            steps = _named(_steps(at.rstrip("`")), left, kind, str(error))
            found = _culprit(problem, steps)
            if found not in replaced:
                problems.append(f"{where}{_explain(problem, steps, left, kind, file or kind)}")
            if not _mended(left, *found, problem=problem, again=found in replaced):
                break
            replaced.append(found)
        except UserError as error:
            problems += [] if problems else [str(error)]  # after the first it may come from what replaces a value
            break
        else:
            if not problems:
                return value
            break
    raise ConfigError("\n".join(problems))


STAND_INS: dict[str, object] = {"int": 1, "float": 1.0, "str": "x", "bool": True, "array": [], "object": {}}
"""Values in place of wrong ones, by what msgspec expected, so that the next problem of a file is found."""


def _named(steps: list[str | int], tables: Any, kind: type[msgspec.Struct], message: str) -> list[str | int]:
    """The path with the keys of free tables, which msgspec writes as ``[...]``: each key is tried alone."""
    if "..." not in steps:
        return steps
    at = steps.index("...")
    keys = _found(tables, steps[:at])
    for key in keys if len(keys) <= MOST_TRIED else []:
        alone = copy.deepcopy(tables)
        table = _walk(alone, steps[:at])
        for other in keys:
            if other != key:
                del table[other]
        try:
            msgspec.convert(alone, type=kind)
        except (msgspec.ValidationError, ConfigError) as error:
            if str(error) == message:
                return _named([*steps[:at], key, *steps[at + 1 :]], tables, kind, message)
    return steps


def _culprit(problem: str, steps: list[str | int]) -> tuple[list[str | int], str | int]:
    """The path of the table that a sentence of msgspec is about, and the key in it."""
    if named := re.search(r"(?:unknown|missing required) field `(.*)`", problem):
        return steps, named[1]
    return steps[:-1], steps[-1] if steps else ""


def _mended(tables: Any, steps: list[str | int], key: str | int, *, problem: str, again: bool) -> bool:
    """Whether a wrong value could be replaced, or left out where that was tried before."""
    table: Any = _walk(tables, steps)
    expected = re.match(r"Expected `(\w+)", problem)
    if expected and not again:
        with contextlib.suppress(LookupError, TypeError):
            table[key] = STAND_INS[expected[1]]
            return True
    return isinstance(table, dict) and table.pop(key, None) is not None


def _check_scalars(value: Any, where: str, path: str = "") -> None:
    """Refuse numbers and texts that no field of any table takes.

    Raises:
        ConfigError: inf, nan, an integer of more than 64 bits, a long text, or one with control characters.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, f"{where}: a key")
            _check_scalars(item, where, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            _check_scalars(item, where, path)
    elif isinstance(value, str):
        _check_text(value, f"{where}: {shortened(path)}")
    elif isinstance(value, int) and value.bit_length() > 63:
        digits = int(value.bit_length() * 0.30103) + 1
        raise ConfigError(f"{where}: {shortened(path)} is an integer of about {digits:,} digits. Use a smaller number.")
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise ConfigError(f"{where}: {shortened(path)} is {value}. Use a finite number.")


def _check_text(text: str, what: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise ConfigError(
            f"{what} has {len(text):,} characters ({plain(text[:20])!r}...). Use at most {LONGEST_TEXT:,}."
        )
    if CONTROL.search(text):
        raise ConfigError(f"{what} has a control character in {plain(shortened(text))!r}. Remove it.")


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place in front of a error that does not know it."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(
    problem: str, steps: list[str | int], tables: Any, kind: type[msgspec.Struct], file: type[msgspec.Struct]
) -> str:
    unknown = re.search(r"unknown field `(.*)`", problem)
    missing = re.search(r"missing required field `(.*)`", problem)
    if unknown or missing:
        known = _fields(kind, steps)
        place = _place(tables, steps)
        if unknown:
            name = shortened(unknown[1])
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            top = (steps or kind is not file) and not isinstance(_walk(tables, [*steps, unknown[1]]), dict)
            if top and name in _fields(file, []):
                hint = "it belongs at the top of the file, above the first [table]. "
            return f'{place}: field "{name}" is not known; {hint}Known: {", ".join(known)}.'
        assert missing is not None
        near = difflib.get_close_matches(missing[1], [k for k in _found(tables, steps) if k not in known], n=1)
        hint = f' ("{shortened(near[0])}" is there, and is not known)' if near else ""
        return f'{place}: field "{missing[1]}" is missing{hint}. Add it: {missing[1]} = ...'
    value = _walk(tables, steps)
    place = _place(tables, steps[:-1])
    field = str(steps[-1]) if steps and isinstance(steps[-1], str) else "value"
    if steps and isinstance(steps[-1], int):
        place, field = _place(tables, steps[:-2]), f"{steps[-2]}, entry {steps[-1] + 1}"
    if COUNT.search(problem) and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return (
            f"{place}: {field} is {value!r}, which TOML reads as a fraction, and a count is wanted. "
            f"Write it in full: {int(value):_}."
        )
    return f"{place}: {shortened(field)} is {QUOTED.repr(value)}. {_wanted(problem, _words(kind, steps))}"


def _wanted(problem: str, words: list[str]) -> str:
    """What would be accepted, from msgspec's sentence and the words that the field may hold."""
    said = problem.replace("`", "").replace("object", "table").replace("array", "list").replace("null", "nothing")
    if "matching regex" in said and "x00-" in said:
        return "Write one line without control characters."
    if "matching regex '^[A-Za-z0-9][" not in said and "matching regex" in said:
        return f"Write text that matches the regular expression {said.partition('matching regex ')[2]}."
    if "matching regex" in said:
        return "Use letters, digits, dot, underscore and hyphen, and begin with a letter or digit."
    if "Invalid enum value" in said:
        return f"Write one of {', '.join(words)}."
    return f"{said.removesuffix('.')}. Change the value."


QUOTED = reprlib.Repr()
"""`repr` of a value of a file, cut where it is long."""
QUOTED.maxstring = QUOTED.maxother = 80


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
    rows = [number for number, step in enumerate(steps) if isinstance(step, int)]
    if rows and (inner := steps[rows[-1] + 1 :]):
        return f"{_place(tables, steps[: rows[-1] + 1])}, {'.'.join(map(str, inner))}"
    names = [str(step) for step in steps if isinstance(step, str)]
    if isinstance(steps[-1], int):
        name = _walk(tables, [*steps, "name"])
        called = f' ("{shortened(name)}")' if isinstance(name, str) and name != "..." else ""
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
