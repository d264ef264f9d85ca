"""Memory of a run: its peak, and the error when the device has too little."""

from __future__ import annotations

import resource
import sys

import torch

from scaling.errors import UserError
from scaling.spec import Placement
from scaling.units import largest_divisor


class OutOfMemory(UserError):
    """The device has too little memory for the run under its placement."""


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(placement: Placement, *, share: int, micro_batch: int, device: torch.device) -> OutOfMemory:
    """The error with a remedy.

    Memory of activations grows with the micro-batch, so the remedy is the largest micro-batch that divides the process's
    share and is at most half of the one that failed. If that is one sequence already, the remedy is other ways to save.

    Args:
        placement: The run's.
        share: Sequences of a process and optimizer step.
        micro_batch: Sequences of the forward pass that failed.
        device: Where it failed.
    """
    if micro_batch > 1:
        smaller = largest_divisor(share, micro_batch // 2)
        remedy = f"Set micro_batch = {smaller} in [placement]; the numbers change only by rounding."
    else:
        ways = [] if placement.recompute else ["recompute = true"]
        ways += [] if placement.strategy == "fsdp2" else ['strategy = "fsdp2" with more devices']
        remedy = f"Set {' or '.join(ways)} in [placement], or use a device with more memory."
    held = ""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held = f" of {total / 2**30:.0f} GiB"
    return OutOfMemory(f"out of memory{held} on {device.type} with {micro_batch} sequences in a forward pass. {remedy}")
