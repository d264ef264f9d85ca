"""The code that jobs run: a copy taken at submission, named by its content.

A job may wait for days, and the working tree does not wait with it. Jobs import the copy, so an edit changes no queued
job; a job that finds other code than it was submitted with refuses to train.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from scaling.provenance import describe_code
from scaling.records import temporary_name, write_json

PACKAGES = ("scaling", "sweeps", "analysis")
KEPT_SUFFIXES = {".py", ".toml", ".typed"}


def code_root() -> Path:
    """The folder that holds the three packages which run now."""
    return Path(__file__).resolve().parent.parent


def _files(root: Path) -> list[Path]:
    return sorted(
        file
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.suffix in KEPT_SUFFIXES and file.is_file() and "__pycache__" not in file.parts
    )


def code_digest(root: Path | None = None) -> str:
    """12 hex digits over names and contents of the packages' files."""
    root = root or code_root()
    digest = hashlib.sha256()
    for file in _files(root):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def take_snapshot(folder: Path) -> Path:
    """A copy of the code under ``folder/<digest>``; the one that is there already if nothing changed."""
    source = code_root()
    target = folder / code_digest(source)
    if target.exists():
        return target
    temporary = temporary_name(target)
    for file in _files(source):
        copy = temporary / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    write_json(temporary / "code.json", describe_code())
    try:
        temporary.rename(target)
    except OSError:  # another submitter was quicker, with the same content
        shutil.rmtree(temporary)
        if not target.exists():
            raise
    return target
