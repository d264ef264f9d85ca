"""A Triton kernel for symmetric products on a GPU: tiles on and below the diagonal, each stored twice.

It is imported only where `products` has seen a CUDA tensor; without Triton `AVAILABLE` is False and nothing breaks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    import triton  # type: ignore[import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

    AVAILABLE = True
except ImportError:  # pragma: no cover - a torch built without Triton
    AVAILABLE = False


TILE = 128
TILE_INNER = 64

if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _lower_tiles(
        x_ptr: Any, add_ptr: Any, out_ptr: Any, side: Any, inner: Any, alpha: Any, beta: Any,
        x_batch: Any, x_row: Any, x_column: Any, add_batch: Any, add_row: Any, out_batch: Any, out_row: Any,
        has_add: tl.constexpr, tile: tl.constexpr, tile_inner: tl.constexpr,
    ) -> None:  # fmt: skip
        """One tile of ``alpha * X X^T + beta * ADD`` and its mirror image; program (i, j, k) with ``j <= i`` works."""
        i, j = tl.program_id(0), tl.program_id(1)
        if j > i:
            return
        x_ptr += tl.program_id(2).to(tl.int64) * x_batch
        out_ptr += tl.program_id(2).to(tl.int64) * out_batch
        rows = i * tile + tl.arange(0, tile)
        columns = j * tile + tl.arange(0, tile)
        total = tl.zeros((tile, tile), dtype=tl.float32)
        for start in range(0, inner, tile_inner):
            depth = start + tl.arange(0, tile_inner)
            left = tl.load(
                x_ptr + rows[:, None] * x_row + depth[None, :] * x_column,
                mask=(rows[:, None] < side) & (depth[None, :] < inner), other=0.0,
            )  # fmt: skip
            right = tl.load(
                x_ptr + columns[None, :] * x_row + depth[:, None] * x_column,
                mask=(columns[None, :] < side) & (depth[:, None] < inner), other=0.0,
            )  # fmt: skip
            total = tl.dot(left, right, total)
        total *= alpha
        inside = (rows[:, None] < side) & (columns[None, :] < side)
        if has_add:
            add_ptr += tl.program_id(2).to(tl.int64) * add_batch
            added = tl.load(add_ptr + rows[:, None] * add_row + columns[None, :], mask=inside, other=0.0)
            total += beta * added.to(tl.float32)
        result = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * out_row + columns[None, :], result, mask=inside)
        if i != j:
            tl.store(out_ptr + columns[:, None] * out_row + rows[None, :], tl.trans(result), mask=tl.trans(inside))


def product_with_own_transpose(
    x: Tensor, out: Tensor, *, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """``alpha * X X^T + beta * add`` for ``(k, s, l)``, any strides; `add` and `out` are ``(k, s, s)``, rows contiguous.

    `add` must be symmetric. For a symmetric ``A`` the product with its own transpose is its square.
    """
    count, side, inner = x.shape
    tiles = triton.cdiv(side, TILE)
    added = out if add is None else add
    _lower_tiles[(tiles, tiles, count)](
        x, added, out, side, inner, alpha, beta,
        x.stride(0), x.stride(1), x.stride(2), added.stride(0), added.stride(1), out.stride(0), out.stride(1),
        has_add=add is not None, tile=TILE, tile_inner=TILE_INNER, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
