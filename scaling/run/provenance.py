"""Device and code of a run, as its record states them."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.io import read_json
from scaling.run.record import Code, Device

if TYPE_CHECKING:
    import torch


CODE_ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package `scaling` which runs now."""

LIBRARIES = ("torch", "lightning", "numpy", "msgspec", "scaling-harness")
"""Distributions whose versions can move a result."""


def describe_device(device: torch.device, *, precision: str, count: int = 1) -> Device:
    """The device of a run, with its dense peak from Lightning's table where that table has it.

    Args:
        device: Where the model lies.
        precision: The run's, ``fp32`` or ``bf16``; the peak depends on it.
        count: Devices that share the run.
    """
    import torch
    from lightning.fabric.utilities.throughput import get_available_flops

    if device.type != "cuda":
        return Device(name=_processor(), kind=device.type, count=count)
    peak = get_available_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Device(
        name=torch.cuda.get_device_name(device), kind="cuda", count=count, peak_flops=float(peak) if peak else None
    )


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def describe_code() -> Code:
    """Commit, uncommitted changes, versions and file hashes of the code that runs now."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    here = CODE_ROOT
    files = code_hashes()
    snapshot = here / "code.json"
    if snapshot.exists():  # a copy taken for SLURM jobs (`sweeps.slurm.sbatch`) says where it was taken from
        taken = read_json(snapshot, Code)
        return Code(commit=taken.commit, dirty=taken.dirty, versions=versions, files=files)
    if not (here / ".git").exists():  # an installed copy; a repository further up would be somebody else's
        return Code(commit=None, dirty=None, versions=versions, files=files)
    commit = _git(here, "rev-parse", "HEAD")
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    return Code(commit=commit, dirty=None if status is None else bool(status), versions=versions, files=files)


@functools.cache
def code_hashes(root: Path = CODE_ROOT) -> dict[str, str]:
    """Hashes of the source files that decide a run's numbers, by path: ``scaling/training/loop.py`` and all that it imports.

    Only modules of the package ``scaling`` are followed. Comments, docstrings, layout and the messages of exceptions do
    not count, so editing them changes no hash. Not covered: the preparation of data (a run's spec has the hash of what was
    prepared), libraries (`Code.versions`), and optimizers or model families that live outside the package. Another
    version of Python can spell a file differently, and so change its hash.

    Args:
        root: Folder that holds the package.
    """
    found: dict[str, str] = {}
    waiting = ["scaling.training.loop"]
    while waiting:
        path = root / waiting.pop().replace(".", "/")
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        name = file.relative_to(root).as_posix()
        if name in found or not file.exists():
            continue
        tree = ast.parse(file.read_bytes())
        waiting += [module for module in _imports(tree) if module.startswith("scaling.")]
        found[name] = hashlib.sha256(ast.unparse(_Numeric().visit(tree)).encode()).hexdigest()[:12]
    return dict(sorted(found.items()))


def changed_files(code: Code) -> tuple[str, ...] | None:
    """Source files in which the code of a record differs from the code that runs now; None where it has no hashes."""
    if not code.files:
        return None
    now = code_hashes()
    return tuple(sorted(file for file in code.files.keys() | now.keys() if code.files.get(file) != now.get(file)))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class _Numeric(ast.NodeTransformer):
    """A syntax tree without what cannot change a number: strings that stand alone, and messages of exceptions."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(exc=kind, cause=None)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
