"""Choice of torch's attention kernel for a run.

On a GPU the fastest kernel for the shape is measured once. Kernels differ in the last bits, so a resumed run must use the
same one: the choice is stored in the run's directory, and in its record. On a CPU the choice depends only on shape and
precision, so that runs are reproducible.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaling.io import write_atomic
from scaling.model_config import ModelConfig

FILE = "attention.txt"

MAX_CONTEXT_FOR_MATH = 128
"""Context up to which a CPU uses the math kernel in bf16, which computes in fp32; for longer ones torch chooses.

CPU ms of a forward and backward pass of one layer in bf16 on one Zen 4 core with torch 2.15, math kernel and torch's
choice (sequences x heads x context x head size): 16 x 4 x 64 x 16, 2.4 and 8.2; 8 x 4 x 128 x 32, 4.4 and 9.1;
8 x 6 x 256 x 32, 29 and 26; 4 x 8 x 512 x 32, 118 and 50.
"""

CANDIDATES = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
TRIALS = 5


def chosen_kernel(
    folder: Path, shape: ModelConfig, *, sequences: int, device: torch.device, precision: str
) -> SDPBackend | None:
    """The kernel of a run; None leaves the choice to torch.

    Args:
        folder: The run's directory.
        shape: The run's model.
        sequences: Sequences per forward pass.
        device: Where it trains.
        precision: The run's, ``fp32`` or ``bf16``.
    """
    if device.type != "cuda":
        return SDPBackend.MATH if precision == "bf16" and shape.context <= MAX_CONTEXT_FOR_MATH else None
    path = folder / FILE
    if path.exists():
        return SDPBackend.__members__.get(path.read_text().strip())
    seconds = measure(shape, sequences=sequences, device=device, precision=precision)
    if not seconds:
        return None
    best = min(seconds, key=lambda name: seconds[name])
    write_atomic(path, best.encode() + b"\n")
    return SDPBackend.__members__[best]


def measure(
    shape: ModelConfig,
    *,
    sequences: int,
    device: torch.device,
    precision: str,
    candidates: tuple[SDPBackend, ...] = CANDIDATES,
) -> dict[str, float]:
    """Seconds of a forward and backward pass of one layer's attention, by kernel; without kernels that reject the shape."""
    latent = shape.mla
    keys = shape.head_size if latent is None else latent.qk_nope_head_dim + latent.qk_rope_head_dim
    values = keys if latent is None else latent.v_head_dim
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query, key, value = (
        torch.randn(sequences, shape.heads, shape.context, size, device=device, dtype=dtype, requires_grad=True)
        for size in (keys, keys, values)
    )
    seconds: dict[str, float] = {}
    for backend in candidates:
        # A kernel that does not support the shape raises RuntimeError, after warnings that explain it.
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            for trial in range(TRIALS + 1):
                if trial == 1:  # the first trial may compile
                    _synchronize(device)
                    since = time.perf_counter()
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                torch.autograd.backward(mixed, torch.ones_like(mixed))
            _synchronize(device)
            seconds[backend.name] = (time.perf_counter() - since) / TRIALS
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
