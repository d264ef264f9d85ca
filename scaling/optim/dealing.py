"""Which process orthogonalises which matrix. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from scaling.optim.coefficients import newton_schulz_flops


def deal(shapes: Sequence[tuple[int, int]], processes: int) -> list[int]:
    """An owner for each matrix, by its rows and columns: dealt round like cards, dearest first, a shape in one go.

    Two processes differ by at most one matrix of each shape, and a shape begins where the one before ended.
    """
    order = sorted(range(len(shapes)), key=lambda index: (-newton_schulz_flops(*shapes[index], steps=1), shapes[index]))
    owners = [0] * len(shapes)
    for position, index in enumerate(order):
        owners[index] = position % processes
    return owners
