"""Next-token loss from hidden states without the logits of a whole batch.

At a vocabulary of 50,304 the fp32 logits of 16,384 tokens are 3.3 GB, and their gradient as much again. Here a chunk of
rows at a time is multiplied by the output matrix, and its gradient is computed at once, so that nothing of the size
``tokens * vocabulary`` outlives a chunk. The number of matrix products is the same as without chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**26
"""Logits of one chunk: 256 MB in fp32. Smaller batches take the plain way, which is faster for them."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def next_token_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, *, elements: int | None = None, chunk_loss: ChunkLoss | None = None
) -> Tensor:
    """Mean cross-entropy in nats, fp32.

    Args:
        hidden: Normalised states ``(N, H)``; the product is in autocast's format, or in theirs without autocast.
        head: Output matrix ``(V, H)``.
        targets: Token numbers ``(N,)``, int64.
        elements: Most logits that exist at once; None is `CHUNK_ELEMENTS`.
        chunk_loss: `loss_and_gradient` or a compiled form of it.
    """
    rows = max(1, (CHUNK_ELEMENTS if elements is None else elements) // head.shape[0])
    if len(hidden) <= rows:
        return F.cross_entropy(F.linear(hidden, head).float(), targets)
    kind = hidden.device.type
    if (dtype := autocast_dtype(kind)) is not None:
        hidden, head = hidden.to(dtype), head.to(dtype)
    with without_autocast(kind):
        loss: Tensor = _Chunked.apply(hidden, head, targets, rows, chunk_loss or loss_and_gradient)
    return loss


def loss_and_gradient(hidden: Tensor, head: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sum of a chunk's losses in fp32, and `scale` times its gradient by the logits in the format of `hidden`."""
    logits = (hidden @ head.T).float()
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    at = targets[:, None]
    loss = (normaliser - logits.gather(1, at)).sum()
    # d loss / d logits = softmax(logits) - 1 at the target, written over the logits.
    gradient = (
        logits.sub_(normaliser).exp_().scatter_add_(1, at, logits.new_full((), -1.0).expand(at.shape)).mul_(scale)
    )
    return loss, gradient.to(hidden.dtype)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, rows: int, chunk_loss: ChunkLoss) -> Tensor:
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # The sum over chunks in fp32: there may be hundreds.
        by_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            # gradient is (rows, V): times head it is (rows, H), its transpose times hidden (V, H).
            loss, gradient = chunk_loss(hidden[part], head, targets[part], 1 / len(hidden))
            total += loss
            if by_hidden is not None:
                by_hidden[part] = gradient @ head
            if by_head is not None:
                by_head += gradient.T @ hidden[part]
        ctx.head_dtype = head.dtype
        ctx.save_for_backward(*(tensor for tensor in (by_hidden, by_head) if tensor is not None))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        by_hidden = saved.pop(0) * given if ctx.needs_input_grad[0] else None
        by_head = (saved.pop(0) * given).to(ctx.head_dtype) if ctx.needs_input_grad[1] else None
        return by_hidden, by_head, None, None, None


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Autocast's current format of matrix products on a kind of device; None where autocast is off."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Context manager in which every operation keeps the format of its operands."""
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
