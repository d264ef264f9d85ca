"""Views: the matrices that a parameter holds. Muon orthogonalises matrices, and a parameter may be several.

A rule names a view: ``whole`` (one matrix), ``rows/k`` (k equal blocks of rows: heads, or a fused projection),
``experts`` (a stack ``(E, m, n)``, a matrix each). The scale of an update follows the matrix, not the parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaling.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def row_blocks(view: str) -> int:
    """Number of row blocks that a view cuts a parameter into: k of ``rows/k``, else 1."""
    return int(view.removeprefix("rows/")) if view.startswith("rows/") else 1


def matrices(name: str, shape: tuple[int, ...], view: str) -> tuple[int, int, int]:
    """Number of matrices that a view finds in a parameter, and their rows and columns.

    Raises:
        UserError: The shape does not fit the view.
    """
    wanted = 3 if view == "experts" else 2
    if len(shape) != wanted:
        raise UserError(
            f'{name} has shape {shape}, and the view "{view}" needs {wanted} dimensions. '
            "Give the parameter a rule of its own in scaling/optim/registry.py."
        )
    if view == "experts":
        return shape[0], shape[1], shape[2]
    blocks = row_blocks(view)  # chunk would make the last block shorter, so the rows must divide evenly
    if shape[0] % blocks:
        raise UserError(
            f"{name} has {shape[0]} rows, which {blocks} blocks do not divide. Use head_blocks 1 or the number of heads."
        )
    return blocks, shape[0] // blocks, shape[1]


def split(parameter: Tensor, view: str) -> tuple[Tensor, ...]:
    """The matrices of a parameter as views into it, each ``(m, n)``."""
    # All are views that share memory with the parameter: an update in place changes it.
    if view == "whole":
        return (parameter,)
    return parameter.unbind() if view == "experts" else parameter.chunk(row_blocks(view))
