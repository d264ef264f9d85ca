"""Hashes of the code of a run: they change with what decides its numbers, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scaling.run.provenance import CODE_ROOT, changed_files, code_hashes, describe_code
from scaling.run.record import Code

MUON, REGISTRY = "scaling/optim/muon.py", "scaling/models/registry.py"


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        (MUON, "momentum, orthogonalised matrix", "AdamW and Muon as one", []),
        (MUON, "from __future__", "# a comment\n\n\nfrom __future__", []),
        (REGISTRY, "upcycling makes experts", "experts are made", []),
        (MUON, 'group["rms"] * max(', '3 * group["rms"] * max(', [MUON]),
    ],
    ids=["docstring", "comment", "message", "number"],
)
def test_hashes_change_only_with_numbers(file: str, old: str, new: str, changed: list[str], tmp_path: Path) -> None:
    shutil.copytree(CODE_ROOT / "scaling", tmp_path / "scaling", ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    hashes, here = code_hashes(tmp_path), code_hashes()
    assert [name for name in here if hashes[name] != here[name]] == changed


def test_changed_files_are_named() -> None:
    code = describe_code()
    assert changed_files(code) == ()
    assert changed_files(Code(commit=None, dirty=None, versions={})) is None
    other = Code(commit=None, dirty=None, versions={}, files=code.files | {MUON: "0", "scaling/gone.py": "1"})
    assert changed_files(other) == ("scaling/gone.py", MUON)
    assert code.digest != other.digest
