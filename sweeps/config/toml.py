"""TOML files as strict values; an error names the table and field, the value found, and the values accepted."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from scaling.errors import CONTROL, ConfigError, UserError, plain, shortened
from sweeps.config.toml_text import KeyPath, nearest_line

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

FLOAT_FOR_COUNT = re.compile(r"Expected `int(?: \| null)?`, got `float`")


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
    lines: Callable[[], Mapping[KeyPath, int]] = dict,
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
    try:
        with located(where):
            return msgspec.convert(tables, type=kind)
    except msgspec.ValidationError as error:  # names the first problem only
        known = lines()
        sentences = [
            f"{where}{problem}" + (f" (line {line})" if (line := nearest_line(known, path)) else "")
            for path, problem in itertools.islice(_problems(tables, kind, _Place(file or kind)), MAX_PROBLEMS)
        ]
        raise ConfigError("\n".join(sentences) or f"{where}: {error}") from None


class _Place(NamedTuple):
    """The place of a value in a file."""

    file: type[msgspec.Struct]
    row: str = ""
    """The table of a list that holds it, as the file writes it: ``, [[rungs]] number 2 ("83k")``."""
    keys: tuple[str, ...] = ()
    """Keys from that row, or from the top of the file."""
    path: KeyPath = ()
    """Keys and positions in lists from the top of the file."""

    @property
    def table(self) -> str:
        """The value as the header of a table."""
        keys = ".".join(self.keys)
        return self.row + ((f", {keys}" if self.row else f", [{keys}]") if keys else "")

    @property
    def parent(self) -> _Place:
        """The table with the value."""
        return self._replace(keys=self.keys[:-1])

    def below(self, key: str) -> _Place:
        """The value of a key in this table."""
        return self._replace(keys=(*self.keys, key), path=(*self.path, key))

    def item(self, number: int, value: Any) -> _Place:
        """An item of this list, a table or another value; the first one has the number 1."""
        if not isinstance(value, dict):
            return self.parent.below(f"{self.keys[-1]}, entry {number}")._replace(path=(*self.path, number - 1))
        called = f' ("{shortened(value["name"])}")' if isinstance(value.get("name"), str) else ""
        row = f"{self.row}, [[{'.'.join(self.keys)}]] number {number}{called}"
        return self._replace(row=row, keys=(), path=(*self.path, number - 1))


Problem = tuple[KeyPath, str]
"""Path of a value that is not accepted, and a sentence on it."""


def _problems(value: Any, kind: Any, place: _Place) -> Iterator[Problem]:
    """Everything in a value that its type does not accept, in the order of the file."""
    parts = _alternatives(kind)
    struct = next((part for part in parts if isinstance(part, type) and issubclass(part, msgspec.Struct)), None)
    if struct is not None and isinstance(value, dict):
        yield from _table_problems(value, struct, place)
        return
    found: list[Problem] = []
    for part in parts:
        if isinstance(value, dict) and get_origin(part) is dict:
            found += [
                line for key, item in value.items() for line in _problems(item, get_args(part)[1], place.below(key))
            ]
        elif isinstance(value, list) and get_origin(part) is tuple:
            for number, item in enumerate(value, start=1):
                found += _problems(item, get_args(part)[0], place.item(number, item))
    try:
        if not found:
            msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        words = [word for part in parts for word in _words(part)]
        found = [(place.path, _wrong_value(value, str(error), words, place))]
    except UserError:
        pass  # the tables in it are checked as a whole when nothing else is wrong
    yield from found


def _table_problems(table: dict[str, Any], struct: type[msgspec.Struct], place: _Place) -> Iterator[Problem]:
    known = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    renamed = {old: new for old, new in RENAMED.get(struct.__name__, {}).items() if old in table}
    for name, value in table.items():
        path = (*place.path, name)
        if name in renamed:
            new = renamed[name]
            yield path, f'{place.table}: field "{name}" is now called "{new}". Write {new} = ... instead.'
        elif name not in known:
            yield path, _unknown_field(name, value, known, place)
        if (field := known.get(renamed.get(name, name))) is not None:
            yield from _problems(value, field.type, place.below(name))
    for name, field in known.items():
        if field.required and name not in table and name not in renamed.values():
            yield place.path, f'{place.table}: field "{name}" is missing. Add it: {name} = ...'


def _unknown_field(name: str, value: Any, known: Iterable[str], place: _Place) -> str:
    near = difflib.get_close_matches(shortened(name), known, n=1, cutoff=0.6)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    if not isinstance(value, dict) and name in place.file.__struct_encode_fields__:
        hint = "it belongs at the top of the file, above the first [table]. "
    return f'{place.table}: field "{shortened(name)}" is not known; {hint}Known: {", ".join(sorted(known))}.'


def _wrong_value(value: Any, problem: str, words: list[str], place: _Place) -> str:
    field = shortened(place.keys[-1]) if place.keys else "value"
    if FLOAT_FOR_COUNT.search(problem) and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        accepted = f"and the field is an integer. Write it in full: {int(value):_}."
        return f"{place.parent.table}: {field} is {value!r}, {accepted}"
    return f"{place.parent.table}: {field} is {QUOTED.repr(value)}. {_accepted(problem, words)}"


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union, without bounds."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [part for member in get_args(kind) for part in _alternatives(member)]
    return [kind]


def _words(kind: Any) -> list[str]:
    """The literals of a type, quoted."""
    return [f'"{word}"' for word in get_args(kind)] if get_origin(kind) is Literal else []


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
