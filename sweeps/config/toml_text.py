"""Text of TOML files: tables written as TOML, and the line of each key.

`tomllib` reads values and forgets where they stood; an explanation of a value names its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

KeyPath = tuple[str | int, ...]
"""A key with the tables that lead to it, such as ``("rungs", 0, "width")``."""

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
HEADER = re.compile(r"\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(#.*)?$")
KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def toml_text(tables: Mapping[str, Any]) -> str:
    """Tables as a TOML file that `tomllib` reads back equal; None and empty tables are left out."""
    return "\n".join(_lines(tables, ())).strip() + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    later: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, Mapping) or _is_array_of_tables(value):
            later.append((name, value))
        elif value is not None:
            yield f"{toml_key(name)} = {toml_value(value)}"
    for name, value in later:
        inner = (*path, name)
        header = ".".join(map(toml_key, inner))
        for part in [value] if isinstance(value, Mapping) else value:
            if part:
                yield f"\n[{header}]" if isinstance(value, Mapping) else f"\n[[{header}]]"
                yield from _lines(part, inner)


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(part, Mapping) for part in value)


def toml_key(name: str) -> str:
    """A key, quoted if it needs quotes."""
    return name if BARE_KEY.fullmatch(name) else toml_value(name)


def toml_value(value: Any) -> str:
    """A value that is no table: strings, numbers and lists of them are written in JSON as in TOML."""
    return msgspec.json.encode(value).decode()


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line number of every table and key of a valid TOML file, from 1; keys of inline tables have no line of their own."""
    lines: dict[KeyPath, int] = {}
    here: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    depth, quotes = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not depth and not quotes:
            if header := HEADER.match(line):
                here = ()
                names = _parts(header[2])
                for at, name in enumerate(names):
                    here = (*here, name)
                    if header[1] == "[[" and at == len(names) - 1:
                        counts[here] = counts.get(here, -1) + 1
                    if here in counts:
                        here = (*here, counts[here])
                lines.setdefault(here, number)
                continue
            if key := KEY.match(line):
                lines.setdefault((*here, *_parts(key[1])), number)
        depth, quotes = _still_open(line, depth, quotes)
    return lines


def nearest_line(lines: Mapping[KeyPath, int], path: Sequence[str | int]) -> int | None:
    """The line of a key, or of the innermost table around it that has one; None for the file itself."""
    return next((lines[tuple(path[:end])] for end in range(len(path), 0, -1) if tuple(path[:end]) in lines), None)


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in PART.findall(dotted)]


TOKEN = re.compile(r"""\"\"\"|'''|"(?:\\.|[^"\\])*"|'[^']*'|[\[\]{}]|\#.*$|\\.""")


def _still_open(line: str, depth: int, quotes: str) -> tuple[int, str]:
    """Brackets and the multi-line string that are open after a line."""
    for token in TOKEN.findall(line):
        if quotes:
            quotes = "" if token == quotes else quotes
        elif token in ('"""', "'''"):
            quotes = token
        elif token[0] == "#":
            break
        else:
            depth += (token in ("[", "{")) - (token in ("]", "}"))
    return depth, quotes
