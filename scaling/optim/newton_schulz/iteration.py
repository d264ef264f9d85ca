"""Newton-Schulz orthogonalisation of a stack of equal matrices: a pure function, chunked, with a reused workspace.

With coefficients a, b, c one step of a wide ``X (m, n)`` is::

    A = X X^T                        (m, m)
    X <- a X + (b A + c A A) X       (m, n)

The result of a matrix does not depend on the stack or chunk that it is in. A tall matrix is multiplied from the right
(``X^T X``), never transposed in memory: on a CPU the transpose costs more than the product it would save.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scaling.optim.newton_schulz.coefficients import GRAM_ASPECT, Form, Step
from scaling.optim.newton_schulz.matmul import by_panels, gram, quadratic

NsDtype = Literal["auto", "bf16", "fp32"]

EPSILON = 1e-7
"""Added to the Frobenius norm that a matrix is divided by; Moonlight's and Keller Jordan's value."""

SMALL_SIDE = 128
"""On a CPU, matrices whose shorter side is below this are iterated in fp32, larger ones in bf16.

Measured on one Zen 4 core (AVX512-BF16), GFLOP/s of ``X X^T`` in fp32 and bf16: side 32, 51 and 20; side 64, 85 and
142; side 128, 83 and 201; side 768, 100 and 210. The limit is not 64, because a CPU without bf16 units is many times
slower in bf16, and the models that a laptop trains are smaller.
"""

CHUNK_BYTES = 8 * 2**20
"""Bytes of the matrices that are iterated together on a CPU: they and their products stay in the cache."""


def resolve_dtype(ns_dtype: NsDtype, device_type: str, rows: int, columns: int) -> torch.dtype:
    """The number format of the iteration: a function of the option, the kind of device and the shape alone."""
    if ns_dtype == "auto":
        return torch.float32 if device_type == "cpu" and min(rows, columns) < SMALL_SIDE else torch.bfloat16
    return torch.bfloat16 if ns_dtype == "bf16" else torch.float32


class Workspace:
    """Buffers that are reused from step to step, one for each use, grown to the largest size requested."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of `shape` on `like`'s device; it is overwritten by the next `take` of the same use."""
        key = (use, dtype or like.dtype, like.device)
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=key[1], device=key[2])
        return buffer[:size].view(shape)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


def chunk_length(rows: int, columns: int, dtype: torch.dtype, device_type: str) -> int:
    """Number of matrices that are iterated together; a GPU takes sixteen times the bytes of a CPU's cache."""
    bound = CHUNK_BYTES if device_type == "cpu" else 16 * CHUNK_BYTES
    return max(1, bound // (rows * columns * dtype.itemsize))


def orthogonalise(
    stack: Tensor,
    steps: tuple[Step, ...],
    *,
    dtype: torch.dtype = torch.bfloat16,
    form: Form = "standard",
    workspace: Workspace | None = None,
) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of the given ones.

    Args:
        stack: Matrices, shape ``(..., m, n)``, any floating dtype; unchanged.
        steps: Polynomials in order, from `scaling.optim.newton_schulz.coefficients.polynomials`.
        dtype: Format of the iteration and of the result. The norm is summed in fp32.
        form: Form of the iteration for matrices of at least `GRAM_ASPECT` times their shorter side.
        workspace: Buffers to reuse; without one new buffers are made and dropped.

    Returns:
        A new tensor of the same shape. A matrix of zeros stays zero.
    """
    result = stack.to(dtype, copy=True).contiguous()  # iterated in place, chunk by chunk
    rows, columns = stack.shape[-2:]
    length = chunk_length(rows, columns, dtype, stack.device.type)
    workspace = workspace or Workspace()
    for chunk in torch.split(result.view(-1, rows, columns), length):
        orthogonalise_(chunk, steps, form, workspace)
    return result


def orthogonalise_(x: Tensor, steps: tuple[Step, ...], form: Form, workspace: Workspace) -> Tensor:
    """`orthogonalise` of one chunk ``(k, m, n)``, in place and in its own format; returns `x`."""
    normalise(x)
    if form == "gram" and max(x.shape[-2:]) >= GRAM_ASPECT * min(x.shape[-2:]):
        from scaling.optim.newton_schulz.gram_form import iterate_gram

        return iterate_gram(x, steps, workspace)
    return iterate(x, steps, workspace)


def normalise(stack: Tensor) -> Tensor:
    """Each matrix of ``(k, m, n)`` divided, in place, by its Frobenius norm: no singular value stays above one.

    The stack is already in the format of the iteration. So a process that receives it in that format, at half the bytes
    of fp32, computes the same numbers as its sender would.
    """
    # The Frobenius norm bounds the largest singular value, and below one the polynomials converge.
    norms = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float32).add_(EPSILON)
    # A zero matrix stays zero, because EPSILON keeps the norm above it.
    if not by_panels(stack):
        return stack.div_(norms)
    for matrix, norm in zip(stack, norms.flatten().tolist(), strict=True):
        matrix.div_(norm)  # large matrices on a CPU: a plain number divides four times faster than a tensor
    return stack


def iterate(x: Tensor, steps: tuple[Step, ...], workspace: Workspace) -> Tensor:
    """The iteration on one chunk ``(k, m, n)`` of normalised matrices, in place; returns `x`."""
    if len(x) > 1 and by_panels(x):  # a large matrix fills the cache alone
        for position in range(len(x)):
            iterate(x[position : position + 1], steps, workspace)
        return x
    count, rows, columns = x.shape
    side = min(rows, columns)
    tall = rows > columns
    square = workspace.take("gram", (count, side, side), x)
    polynomial = workspace.take("polynomial", (count, side, side), x)
    here, there = x, workspace.take("other", (count, rows, columns), x)
    for a, b, c in steps:
        # A = X X^T, then Q = b A + c A A, both (k, s, s).
        quadratic(gram(here, square), b, c, polynomial)
        # X <- a X + Q X, or a X + X Q for tall matrices. baddbmm cannot write to its input, so two buffers take turns.
        left, right = (here, polynomial) if tall else (polynomial, here)
        torch.baddbmm(here, left, right, beta=a, out=there)
        here, there = there, here
    # After an odd number of steps the result is in the workspace.
    return x if here is x else x.copy_(here)
