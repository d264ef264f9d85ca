"""Memory of a run: what it took at most, and what to say when there is too little."""

from __future__ import annotations

import resource
import sys

import torch

from scaling.errors import UserError
from scaling.spec import Placement


class OutOfMemory(UserError):
    """The device has too little memory for the run as it is placed."""


def peak_bytes(device: torch.device) -> int:
    """The most that was held: on a GPU by tensors, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(placement: Placement, *, share: int, micro_batch: int, device: torch.device) -> OutOfMemory:
    """The error that says what would fit.

    Activations grow with the micro-batch, so the largest that divides a process's share and is at most half of the one
    that failed; where one window is too much already, the ways to spend less on it.
    """
    smaller = [n for n in range(1, micro_batch // 2 + 1) if share % n == 0]
    if smaller:
        remedy = f"Set micro_batch = {smaller[-1]} in [placement]; it changes no number but for rounding."
    else:
        ways = [] if placement.recompute else ["recompute = true"]
        ways += [] if placement.strategy == "fsdp2" else ['strategy = "fsdp2" with more devices']
        remedy = f"Set {' or '.join(ways)} in [placement], or use a device with more memory."
    held = ""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held = f" of {total / 2**30:.0f} GiB"
    return OutOfMemory(f"out of memory{held} on {device.type} with {micro_batch} windows in a forward pass. {remedy}")
