"""Registries: rows of installed packages, and names that are not known."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from scaling import registry
from scaling.errors import UserError
from scaling.registry import Registry


def install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Pretend that an installed package registers a thing."""
    point = EntryPoint(name=name, value=value, group="scaling_harness.things")
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]).select(group=group))


def test_a_package_adds_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "outside", "math:pi")
    assert dict(Registry("thing", "things", {"inside": 1.0})) == {
        "inside": 1.0,
        "outside": pytest.approx(3.14159, 1e-5),
    }


def test_a_module_may_be_imported_before_the_registry_that_lists_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "things_registry.py").write_text(
        "from scaling.registry import Registry\nclass Thing: pass\nTHINGS = Registry('thing', 'things', {})\n"
    )
    (tmp_path / "things_outside.py").write_text("from things_registry import Thing\nROW = Thing()\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, "outside", "things_outside:ROW")
    outside = importlib.import_module("things_outside")
    assert importlib.import_module("things_registry").THINGS["outside"] is outside.ROW


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("inside", "math:pi", "that name is taken"), ("outside", "no_such_package:row", "cannot be imported")],
)
def test_a_broken_registration_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    install(monkeypatch, name, value)
    with pytest.raises(UserError, match=sentence):
        Registry("thing", "things", {"inside": 1.0}).row("inside")


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UserError, match='thing "insid" is not known; did you mean "inside"'):
        Registry("thing", "things", {"inside": 1.0}).row("insid")
