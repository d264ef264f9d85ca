"""The code that jobs run: a copy taken at submission, named by its content.

A job may wait for days, and the working tree does not wait with it. Jobs import the copy, so an edit changes no queued
job; a job that finds other code than it was submitted with refuses to train.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import shlex
import shutil
import stat
from pathlib import Path

from scaling.errors import UserError
from scaling.io import temporary_name, write_json
from scaling.run.provenance import describe_code
from sweeps.slurm.job_exits import UNNOTED

PACKAGES = ("scaling", "sweeps", "analysis")
DESCRIPTION = "code.json"
"""File of a snapshot that says which commit it is; not code, and not hashed."""

KEPT_SUFFIXES = {".py", ".toml", ".typed"}


def code_root() -> Path:
    """The folder that holds the three packages which run now."""
    return Path(__file__).resolve().parents[2]


def _files(root: Path) -> list[Path]:
    return sorted(
        file
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.suffix in KEPT_SUFFIXES and file.is_file() and "__pycache__" not in file.parts
    )


def code_hash(root: Path | None = None) -> str:
    """SHA-256 over what ``sha256sum`` prints for the packages' files in the order of their names."""
    root = root or code_root()
    lines = {
        f"./{file.relative_to(root).as_posix()}".encode(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in _files(root)
    }
    return hashlib.sha256(b"".join(lines[name].encode() + b"  " + name + b"\n" for name in sorted(lines))).hexdigest()


def code_digest(root: Path | None = None) -> str:
    """The first 12 hex digits of `code_hash`."""
    return code_hash(root)[:12]


def check_in_shell(folder: Path, digest: str) -> str:
    """A shell command that ends the script unless a snapshot holds the files of that `code_hash` and no others.

    It imports nothing from the snapshot: the batch script, which SLURM keeps, decides before Python sees the folder.
    A module, a compiled file or a link that was added changes the hash or makes ``sha256sum`` fail.
    """
    where = shlex.quote(str(folder))
    return (
        f"found=$(set -o pipefail; cd {where} && find . ! -type d ! -path ./{DESCRIPTION} -print0 | LC_ALL=C sort -z "
        f'| xargs -0 sha256sum | sha256sum) && [ "${{found%% *}}" = {digest} ] || {{ '
        f"echo {where}: other code than was submitted, so nothing is started. Remove the folder and submit again. >&2; "
        f"exit {UNNOTED}; }}"
    )


def exposed(root: Path) -> Path | None:
    """The run root, a folder of it or a parent through which others can replace what jobs execute; None if there is none.

    A group that has the user's name and no other members is the user alone. In a folder with the sticky bit, only the
    owner of an entry can rename it.
    """
    root = root.resolve()
    for folder in (root / "code", root / "submissions", root / "runs", root):
        if folder.exists() and (folder.stat().st_uid not in (os.getuid(), 0) or _others_write(folder)):
            return folder
    return next(
        (p for p in root.parents if p.exists() and _others_write(p) and not p.stat().st_mode & stat.S_ISVTX), None
    )


def _others_write(folder: Path) -> bool:
    status = folder.stat()
    if not status.st_mode & stat.S_IWGRP:
        return bool(status.st_mode & stat.S_IWOTH)
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    private = user.pw_gid == group.gr_gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}
    return not private or bool(status.st_mode & stat.S_IWOTH)


def take_snapshot(folder: Path) -> Path:
    """A copy of the code under ``folder/<digest>``; the one that is there already if nothing changed.

    Raises:
        UserError: The folder of that digest holds other files.
    """
    source = code_root()
    target = folder / code_digest(source)
    if target.exists():
        found = {path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()} - {target / DESCRIPTION}
        if found != set(_files(target)) or code_digest(target) != target.name:
            raise UserError(
                f"{target}: the folder holds other files than the code of this digest. Nothing was submitted; remove the "
                "folder and submit again."
            )
        return target
    temporary = temporary_name(target)
    for file in _files(source):
        copy = temporary / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    write_json(temporary / DESCRIPTION, describe_code())
    try:
        temporary.rename(target)
    except OSError:  # another submitter was quicker, with the same content
        shutil.rmtree(temporary)
        if not target.exists():
            raise
    return target
