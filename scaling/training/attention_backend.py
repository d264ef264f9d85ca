"""Which of torch's attention kernels a run uses: the fastest for its shape, measured once and kept for its life.

Kernels differ in the last bits, so a run that was stopped must go on with the one that it began with: the choice is a
file in the run's directory, and in its record. On a CPU torch's own choice stands.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaling.io import write_atomic
from scaling.spec import ModelConfig

FILE = "attention.txt"

CANDIDATES = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
TRIALS = 5


def chosen_kernel(
    folder: Path, shape: ModelConfig, *, windows: int, device: torch.device, precision: str
) -> SDPBackend | None:
    """The kernel of a run: the one that it began with, or the fastest; None leaves the choice to torch.

    Args:
        folder: The run's directory.
        shape: Its model.
        windows: Of one forward pass.
        device: Where it trains.
        precision: The run's, ``fp32`` or ``bf16``.
    """
    if device.type != "cuda":
        return None
    path = folder / FILE
    if path.exists():
        return SDPBackend.__members__.get(path.read_text().strip())
    seconds = measure(shape, windows=windows, device=device, precision=precision)
    if not seconds:
        return None
    best = min(seconds, key=lambda name: seconds[name])
    write_atomic(path, best.encode() + b"\n")
    return SDPBackend.__members__[best]


def measure(
    shape: ModelConfig,
    *,
    windows: int,
    device: torch.device,
    precision: str,
    candidates: tuple[SDPBackend, ...] = CANDIDATES,
) -> dict[str, float]:
    """Seconds of a forward and backward pass of one layer's attention, by kernel; those that refuse the shape left out."""
    latent = shape.mla
    keys = shape.head_size if latent is None else latent.qk_nope_head_dim + latent.qk_rope_head_dim
    values = keys if latent is None else latent.v_head_dim
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query, key, value = (
        torch.randn(windows, shape.heads, shape.context, size, device=device, dtype=dtype, requires_grad=True)
        for size in (keys, keys, values)
    )
    seconds: dict[str, float] = {}
    for backend in candidates:
        # A kernel that does not take the shape says so with a RuntimeError, and with warnings that explain it.
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            for trial in range(TRIALS + 1):
                if trial == 1:  # the first one may compile
                    _wait(device)
                    since = time.perf_counter()
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                torch.autograd.backward(mixed, torch.ones_like(mixed))
            _wait(device)
            seconds[backend.name] = (time.perf_counter() - since) / TRIALS
    return seconds


def attending_by(backend: SDPBackend | None) -> contextlib.AbstractContextManager[object]:
    """A context in which attention uses the kernel."""
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
