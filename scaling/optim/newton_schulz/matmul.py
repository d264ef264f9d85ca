"""The two symmetric products of Newton-Schulz, ``X X^T`` and ``b A + c A A``.

Half of a symmetric product is its mirror image. On a CPU large matrices are computed in panels of one triangle and
mirrored; small ones, and all on a GPU, take one batched product. The choice depends on the kind of device and the shape
alone, so a run repeats itself bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 128
"""Columns of a panel on a CPU."""

PANELS_FROM = 384
"""Shorter side from which a CPU works in panels.

Measured on one Zen 4 core in bf16, a product in ms, whole and by panels of 128: X X^T of 768 x 2048, 11.3 and 7.0, of
2048 x 768, 12.7 and 8.1; A A of side 768, 4.3 and 3.0, the mirror image 0.2. Below this side nothing is gained.
"""


def by_panels(x: Tensor) -> bool:
    """True if the symmetric products of ``(..., m, n)`` matrices are computed in panels."""
    return x.device.type == "cpu" and min(x.shape[-2:]) >= PANELS_FROM


def gram(x: Tensor, out: Tensor) -> Tensor:
    """``X X^T`` of wide and ``X^T X`` of tall matrices: ``(k, m, n)`` to ``(k, s, s)``, s the shorter side."""
    # The shorter side is in front, so that the square is (s, s); a transposed view costs nothing.
    factor = x.mT if x.shape[-2] > x.shape[-1] else x  # (k, s, l)
    if by_panels(x):
        for matrix, result in zip(factor, out, strict=True):
            _by_panels(matrix, result, upper=factor is not x)
        return out
    return torch.bmm(factor, factor.mT, out=out)


def quadratic(a: Tensor, b: float, c: float, out: Tensor) -> Tensor:
    """``b A + c A A`` of symmetric matrices ``(k, s, s)``."""
    if by_panels(a):
        for matrix, result in zip(a, out, strict=True):
            _by_panels(matrix, result, add=matrix, beta=b, alpha=c)
        return out
    return torch.baddbmm(a, a, a, beta=b, alpha=c, out=out)


def _by_panels(
    x: Tensor, out: Tensor, *, upper: bool = False, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """``beta * add + alpha * X X^T`` of one ``(s, l)`` matrix: panels of one triangle, each then mirrored.

    Columns of the lower triangle read an `x` whose rows are contiguous best, rows of the upper one a transposed `x`.
    """
    for start in range(0, len(out), PANEL):
        stop = min(start + PANEL, len(out))
        narrow, rest = slice(start, stop), slice(start, None)
        # The panel of this step: PANEL columns from the diagonal down, or PANEL rows from the diagonal to the right.
        rows, columns = (narrow, rest) if upper else (rest, narrow)
        panel = out[rows, columns]
        if add is None:
            torch.mm(x[rows], x[columns].T, out=panel)
        else:
            torch.addmm(add[rows, columns], x[rows], x[columns].T, beta=beta, alpha=alpha, out=panel)
        # Its part off the diagonal is the transpose of the part on the other side.
        below, beside = out[stop:, narrow], out[narrow, stop:]
        below.copy_(beside.T) if upper else beside.copy_(below.T)
