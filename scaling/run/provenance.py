"""Provenance of a run: the device and the code, as its record states them."""

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
"""Folder of the running package `scaling`."""

LIBRARIES = ("torch", "lightning", "numpy", "msgspec", "scaling-harness")
"""Distributions whose versions can change a result."""


def describe_device(device: torch.device, *, precision: str, count: int = 1) -> Device:
    """The device of a run, with its dense peak if Lightning's table contains it.

    Args:
        device: Device of the model.
        precision: The run's precision, ``fp32`` or ``bf16``, which the peak depends on.
        count: Devices of the run.
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
    """Commit, uncommitted changes, versions and file hashes of the running code."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    commit, dirty = None, None  # of an installed copy; a repository further up would be another project's
    snapshot = CODE_ROOT / "code.json"
    if snapshot.exists():  # a copy for SLURM jobs (`sweeps.slurm.sbatch`) records its origin
        origin = read_json(snapshot, Code)
        commit, dirty = origin.commit, origin.dirty
    elif (CODE_ROOT / ".git").exists():
        commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        dirty = None if status is None else bool(status)
    return Code(commit=commit, dirty=dirty, versions=versions, files=code_hashes())


@functools.cache
def code_hashes(root: Path = CODE_ROOT) -> dict[str, str]:
    """Hashes of the source files that decide a run's numbers, by path: ``scaling/training/loop.py`` and its imports.

    Imports are followed within the package ``scaling``. Comments, docstrings, formatting and messages of exceptions do
    not count. Not covered: the preparation of data (the spec has the hash of the shards), libraries (`Code.versions`),
    and optimizers or model families outside the package. Another version of Python can change the hashes.

    Args:
        root: Folder of the package.
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
    """Source files in which a record's code differs from the running code; None if the record has no hashes."""
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
    """Removes from a syntax tree what cannot change a number: docstrings and messages of exceptions."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(exc=kind, cause=None)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(CODE_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
