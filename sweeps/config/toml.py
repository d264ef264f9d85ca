"""TOML files as strict values; an error names the table and field, the value found, and the values accepted."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import operator
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from scaling.errors import CONTROL, ConfigError, UserError, plain, shortened
from sweeps.config.toml_text import nearest_line

T = TypeVar("T", bound=msgspec.Struct)

MAX_FILE_BYTES = 1 << 20
"""Size limit of a file that a person writes."""

MAX_TEXT_LENGTH = 1000
"""Characters of a key or a string."""

MAX_TABLE_DEPTH = 20
"""Depth of nested tables. `tomllib` takes time quadratic in the parts of a dotted key, so they are counted first."""

DEEP_KEY = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){{{MAX_TABLE_DEPTH},}}""")

MAX_PROBLEMS = 10
"""Problems of one file that one error reports."""

MAX_KEYS_TRIED = 100
"""Keys of a free table that are tried one by one to find the wrong one."""

RENAMED: dict[str, dict[str, str]] = {
    "SlurmConfig": {
        "minutes": "time_minutes", "gpus": "gpus_per_node", "cpus": "cpus_per_task", "tasks": "tasks_per_node",
        "parallel": "max_parallel", "tries": "max_kills",
    },
    "SharedModelConfig": {"mixture": "moe", "latent": "mla"},
    "ArmConfig": {"mixture": "moe", "latent": "mla", "initial": "warm_start"},
    "MoEConfig": {
        "active": "top_k", "gate_scale": "routed_scaling_factor", "experts": "num_experts",
        "shared": "num_shared_experts", "bias_rate": "bias_update_rate",
    },
    "MLAConfig": {
        "kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank", "plain": "qk_nope_head_dim", "rotary": "qk_rope_head_dim",
        "value": "v_head_dim", "rope_base": "rope_theta",
    },
    "WarmStartConfig": {"how": "method", "charged": "count_flops"},
    "TuneConfig": {"law": "transfer"},
    "CampaignFile": {"law": "rule"},
}  # fmt: skip
"""Former names of keys and their present names, by the Struct of their table."""

NAMED_FIELD = re.compile(r"(?:unknown|missing required) field `(.*)`")
FLOAT_FOR_COUNT = re.compile(r"Expected `int(?: \| null)?`, got `float`")
PATH_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+|\.\.\.)\]")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: The file is missing, too large, or not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shortened(str(path))}: cannot be read ({why}). Give the path of a TOML file.") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes. Give the path of a campaign file.")
    try:
        tables = _parsed(content.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not valid TOML: {shortened(str(error), 200)}. "
            "Correct the syntax there: quote strings, and put table names in brackets."
        ) from None
    _check_scalars(tables, path.name)
    return tables


def _parsed(text: str) -> dict[str, Any]:
    """The tables of TOML text; raises ValueError, or RecursionError where values are nested too deeply."""
    if found := DEEP_KEY.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"a key of more than {MAX_TABLE_DEPTH} parts (line {line})")
    return tomllib.loads(text)


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The tables of `base` with the keys of `own`; sub-tables are merged, and so are entries of one name in two lists."""
    both = dict(base)
    for key, value in own.items():
        mine = both.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            both[key] = merged(mine, value)
        elif (known := _by_name(mine)) is not None and (changed := _by_name(value)) is not None:
            both[key] = list(
                (known | {name: merged(known.get(name, {}), table) for name, table in changed.items()}).values()
            )
        else:
            both[key] = value
    return both


def _by_name(value: Any) -> dict[str, dict[str, Any]] | None:
    """A list of tables with names, such as ``[[arms]]``, by name; None for any other value."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("name"), str) for part in value):
        return {part["name"]: part for part in value}
    return None


def override(tables: dict[str, Any], setting: str) -> None:
    """Set ``table.key=value`` in the tables; the value is TOML, or else a string without quotes.

    Raises:
        ConfigError: The setting has another form, or its path leads through a value that is no table.
    """
    shown = shortened(setting)
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
        raise ConfigError(f'"{shown}" is not a setting. Write TABLE.KEY=VALUE, such as placement.threads=2.')
    try:
        value = _parsed(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    _check_scalars(value, f"--set {shown}", key)
    *path, last = key.split(".")
    if len(path) >= MAX_TABLE_DEPTH:
        raise ConfigError(f'"{shown}" leads through more than {MAX_TABLE_DEPTH} tables. Write TABLE.KEY=VALUE.')
    here = tables
    for step in path:
        here = here.setdefault(step, {})
        if not isinstance(here, dict):
            raise ConfigError(f'"{shown}": {step} is no table of the campaign, so nothing in it can be set.')
    here[last] = value


def as_value(
    tables: Any,
    kind: type[T],
    *,
    where: str,
    file: type[msgspec.Struct] | None = None,
    lines: Callable[[], Mapping[tuple[str | int, ...], int]] = dict,
) -> T:
    """Tables as a strict value.

    Args:
        tables: The tables from `read_toml`, or a part of them.
        kind: The Struct to make.
        where: Name of the file, and of the table if `tables` is a part, for errors.
        file: The Struct of the whole file, if `kind` is the Struct of a part.
        lines: Returns the line of each key in the file (`sweeps.config.toml_text.key_lines`), which errors then name.

    Raises:
        ConfigError: Unknown keys (each with the nearest known one), missing keys, wrong types and impossible values: one
            line each, up to `MAX_PROBLEMS`.
    """
    left = copy.deepcopy(tables)
    problems: list[str] = []
    replaced: list[tuple[list[str | int], str | int]] = []
    while len(problems) < MAX_PROBLEMS:
        try:
            with located(where):
                value = msgspec.convert(left, type=kind)
        except msgspec.ValidationError as error:
            problem, _, at = str(error).partition(" - at `$")
            steps = _with_free_keys(_steps(at.rstrip("`")), left, kind, str(error))
            named = NAMED_FIELD.search(problem)
            found = (steps, named[1]) if named else (steps[:-1], steps[-1] if steps else "")
            if found not in replaced:
                line = nearest_line(lines(), [*found[0], found[1]])
                at_line = f" (line {line})" if line else ""
                problems.append(f"{where}{_explain(problem, steps, left, kind, file or kind)}{at_line}")
            if not _repair(left, *found, kind=kind, problem=problem, again=found in replaced):
                break
            replaced.append(found)
        except UserError as error:
            problems += [] if problems else [str(error)]  # a later one may come from a placeholder
            break
        else:
            if not problems:
                return value
            break
    raise ConfigError("\n".join(problems))


PLACEHOLDERS: dict[str, object] = {"int": 1, "float": 1.0, "str": "x", "bool": True, "array": [], "object": {}}
"""Values that replace wrong ones, by the type that msgspec expected, so that the next problem of a file is found."""


def _with_free_keys(steps: list[str | int], tables: Any, kind: type[msgspec.Struct], message: str) -> list[str | int]:
    """The path with the keys of free tables, which msgspec reports as ``[...]``: each key is tried alone."""
    if "..." not in steps:
        return steps
    at = steps.index("...")
    keys = list(_walk(tables, steps[:at]))
    for key in keys if len(keys) <= MAX_KEYS_TRIED else []:
        alone = copy.deepcopy(tables)
        table = _walk(alone, steps[:at])
        for other in {*keys} - {key}:
            del table[other]
        try:
            msgspec.convert(alone, type=kind)
        except (msgspec.ValidationError, UserError) as error:
            if str(error) == message:
                return _with_free_keys([*steps[:at], key, *steps[at + 1 :]], tables, kind, message)
    return steps


def _repair(
    tables: Any, steps: list[str | int], key: str | int, *, kind: type[msgspec.Struct], problem: str, again: bool
) -> bool:
    """Rename, replace or (`again`) remove a wrong entry so that the next problem is found; False if nothing changed."""
    table: Any = _walk(tables, steps)
    expected = re.match(r"Expected `(\w+)", problem)
    if expected and not again:
        with contextlib.suppress(LookupError, TypeError):
            table[key] = PLACEHOLDERS[expected[1]]
            return True
    if not isinstance(table, dict) or key not in table:
        return False
    value = table.pop(key)
    if (new := _renamed(kind, steps, str(key))) is not None:
        table.setdefault(new, value)
    return True


def _renamed(kind: type[msgspec.Struct], steps: list[str | int], key: str) -> str | None:
    """The present name of a former key; None if the key never had another name."""
    struct = _struct(_type_at(kind, steps))
    return RENAMED.get(struct.cls.__name__, {}).get(key) if struct else None


def _check_scalars(value: Any, where: str, path: str = "") -> None:
    """Refuse what no field of any table accepts: inf, nan, huge integers, long texts, control characters."""
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
    if len(text) > MAX_TEXT_LENGTH:
        raise ConfigError(
            f"{what} has {len(text):,} characters ({plain(text[:20])!r}...). Use at most {MAX_TEXT_LENGTH:,}."
        )
    if CONTROL.search(text):
        raise ConfigError(f"{what} has a control character in {plain(shortened(text))!r}. Remove it.")


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Context that puts a place in front of the sentence of an error."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(
    problem: str, steps: list[str | int], tables: Any, kind: type[msgspec.Struct], file: type[msgspec.Struct]
) -> str:
    if named := NAMED_FIELD.search(problem):
        name, known, place = named[1], _fields(kind, steps), _place(tables, steps)
        table = _walk(tables, steps)
        if "missing required" in problem:
            near = difflib.get_close_matches(name, [key for key in table if key not in known], n=1)
            hint = f' ("{shortened(near[0])}" is there, and is not known)' if near else ""
            return f'{place}: field "{name}" is missing{hint}. Add it: {name} = ...'
        if (new := _renamed(kind, steps, name)) is not None:
            return f'{place}: field "{name}" is now called "{new}". Write {new} = ... instead.'
        near = difflib.get_close_matches(shortened(name), known, n=1, cutoff=0.6)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        if (steps or kind is not file) and not isinstance(_walk(table, [name]), dict) and name in _fields(file, []):
            hint = "it belongs at the top of the file, above the first [table]. "
        return f'{place}: field "{shortened(name)}" is not known; {hint}Known: {", ".join(known)}.'
    value = _walk(tables, steps)
    place = _place(tables, steps[:-1])
    field = "value"
    if steps and isinstance(steps[-1], int):
        place, field = _place(tables, steps[:-2]), f"{steps[-2]}, entry {steps[-1] + 1}"
    elif steps:
        field = str(steps[-1])
    if FLOAT_FOR_COUNT.search(problem) and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{place}: {field} is {value!r}, and the field is an integer. Write it in full: {int(value):_}."
    return f"{place}: {shortened(field)} is {QUOTED.repr(value)}. {_accepted(problem, _literals(kind, steps))}"


def _accepted(problem: str, words: list[str]) -> str:
    """A sentence on the accepted values, from msgspec's message and the literals of the field."""
    text = problem.replace("`", "").replace("object", "table").replace("array", "list").replace("null", "nothing")
    _, regex, pattern = text.partition("matching regex ")
    if "x00-" in pattern:
        return "Write one line without control characters."
    if pattern.startswith("'^[A-Za-z0-9]["):
        return "Use letters, digits, dot, underscore and hyphen, and begin with a letter or digit."
    if regex:
        return f"Write text that matches the regular expression {pattern}."
    if "Invalid enum value" in text:
        return f"Write one of {', '.join(words)}."
    return f"{text.removesuffix('.')}. Change the value."


QUOTED = reprlib.Repr()
"""`repr` for values of a file, shortened."""
QUOTED.maxstring = QUOTED.maxother = 80


def _steps(path: str) -> list[str | int]:
    # msgspec writes a key of a free table as [...].
    return [name or (int(number) if number.isdigit() else "...") for name, number in PATH_STEP.findall(path)]


def _walk(tables: Any, steps: list[str | int]) -> Any:
    try:
        return functools.reduce(operator.getitem, steps, tables)
    except (KeyError, IndexError, TypeError):
        return "..."


def _place(tables: Any, steps: list[str | int]) -> str:
    """The table as the file writes it: ``, [[rungs]] number 2 ("83k")``."""
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
    struct = _struct(_type_at(kind, steps))
    return sorted(field.encode_name for field in struct.fields) if struct else []


def _literals(kind: type[msgspec.Struct], steps: list[str | int]) -> list[str]:
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
    if isinstance(found, inspect.VarTupleType | inspect.DictType):
        return _struct(found.item_type if isinstance(found, inspect.VarTupleType) else found.value_type)
    return None
