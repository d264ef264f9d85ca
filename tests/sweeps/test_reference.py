"""The reference of the campaign file, and former names of its keys."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from scaling.errors import UserError
from sweeps.config.reference import EXAMPLES, descriptions, heading, page, tables
from sweeps.config.toml import RENAMED, as_value

PAGE = Path(__file__).parents[2] / "docs" / "campaign-file.md"


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python -m sweeps.config.reference > docs/campaign-file.md"


@pytest.mark.parametrize("path", tables())
def test_each_example_loads(path: str) -> None:
    content = tomllib.loads(f"{heading(path)}\n{EXAMPLES[path]}\n")
    for name in path.split(".") if path else []:
        content = content[name]
    if path == "":
        content |= {"data": {}, "model": {"vocabulary": 256, "context": 8}, "arms": [{"name": "a", "optimizer": "b"}]}
    kind = tables()[path].cls
    for table in content if isinstance(content, list) else [content]:
        assert isinstance(as_value(table, kind, where="example"), kind)


@pytest.mark.parametrize(
    "path", [path for path, struct in tables().items() if "sweeps.config.c" in struct.cls.__module__]
)
def test_each_key_is_described(path: str) -> None:
    struct = tables()[path]
    assert {field.name for field in struct.fields} <= descriptions(struct.cls).keys()


STRUCTS = {struct.cls.__name__: struct for struct in tables().values()}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [(kind, old, new) for kind, names in RENAMED.items() for old, new in names.items()],
)
def test_a_former_key_is_answered_with_its_present_name(kind: str, old: str, new: str) -> None:
    with pytest.raises(UserError, match=f'"{old}" is now called "{new}"') as refused:
        as_value({old: 1}, STRUCTS[kind].cls, where="old.toml")
    assert f'"{new}" is missing' not in str(refused.value)
