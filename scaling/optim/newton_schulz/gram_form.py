"""The Gram form of Newton-Schulz: the same polynomials, iterated on the short side's square matrices.

With ``R = X X^T`` and ``P = a + b R + c R^2``, the next matrix is ``P X`` and its own Gram matrix ``P R P``: all of
them are polynomials of one symmetric matrix, so they commute, and several steps need the long ``X`` only at the end.
A matrix of aspect 2.67 costs 0.78 of the standard form, one of 4 costs 0.67.

The price is rounding: the small eigenvalues of ``R`` are differences of large entries, and every step multiplies their
errors by up to ``a^2``. In bf16 the iteration breaks (largest singular value 3 to 15 instead of 1.1), so the inside is
fp16 or fp32 here, never bf16, and after two or three steps it starts again from the matrix (`gram_runs`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.optim.newton_schulz.coefficients import Step, gram_runs
from scaling.optim.newton_schulz.iteration import Workspace
from scaling.optim.newton_schulz.matmul import gram, quadratic


def inside_format(x: Tensor) -> torch.dtype:
    """fp32 on a CPU and for fp32 matrices, else fp16, whose range suffices because the matrices are normalised."""
    return torch.float32 if x.device.type == "cpu" or x.dtype == torch.float32 else torch.float16


def iterate_gram(x: Tensor, steps: tuple[Step, ...], workspace: Workspace, inside: torch.dtype | None = None) -> Tensor:
    """The iteration on normalised matrices ``(k, m, n)``, in place; returns `x`, in whose format the result is stored.

    `inside` is the format of everything between; `inside_format` unless given.
    """
    inside = inside or inside_format(x)
    assert inside != torch.bfloat16, "the Gram form breaks in bf16"
    tall = x.shape[-2] > x.shape[-1]
    here = workspace.take("gram form, here", tuple(x.shape), x, inside).copy_(x)
    there = workspace.take("gram form, there", tuple(x.shape), x, inside)
    done = 0
    # Each run multiplies the matrix by the product of its steps' polynomials, then forms a fresh Gram matrix.
    for length in gram_runs(len(steps)):
        polynomial = _product_of_polynomials(here, steps[done : done + length], workspace)
        torch.bmm(here, polynomial, out=there) if tall else torch.bmm(polynomial, here, out=there)
        here, there = there, here
        done += length
    return x.copy_(here)


def _product_of_polynomials(x: Tensor, steps: tuple[Step, ...], workspace: Workspace) -> Tensor:
    """The product of several steps' polynomials, ``(k, s, s)``, s the shorter side: it multiplies `x`."""
    side = min(x.shape[-2:])
    square, factor, product, spare = (
        workspace.take(f"gram form, {use}", (len(x), side, side), x) for use in ("square", "factor", "product", "spare")
    )
    gram(x, square)  # R = X X^T
    for number, (a, b, c) in enumerate(steps):
        # P = a + b R + c R^2
        quadratic(square, b, c, factor)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        # The product so far times P; the factors commute, so their order does not matter.
        if number == 0:
            product.copy_(factor)
        else:
            torch.bmm(product, factor, out=spare)
            product, spare = spare, product
        if number < len(steps) - 1:  # R <- P R P, the Gram matrix of P X
            torch.bmm(factor, square, out=spare)
            torch.bmm(spare, factor, out=square)
    return product
