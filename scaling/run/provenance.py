"""On what and from which code a run ran: facts that its record carries."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.io import read_json
from scaling.run.record import Code, Device

if TYPE_CHECKING:
    import torch


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
    """Commit, dirtiness and versions of the code that runs now."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    here = Path(__file__).resolve().parents[2]
    snapshot = here / "code.json"
    if snapshot.exists():  # a copy taken for SLURM jobs (`sweeps.slurm.snapshot`) says where it was taken from
        taken = read_json(snapshot, Code)
        return Code(commit=taken.commit, dirty=taken.dirty, versions=versions)
    if not (here / ".git").exists():  # an installed copy; a repository further up would be somebody else's
        return Code(commit=None, dirty=None, versions=versions)
    commit = _git(here, "rev-parse", "HEAD")
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    return Code(commit=commit, dirty=None if status is None else bool(status), versions=versions)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
