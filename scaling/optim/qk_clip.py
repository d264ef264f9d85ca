"""QK-clip: after a step, query and key weights of a head are shrunk if its largest attention logit passed a bound.

Moonlight saw logits above 100 under Muon (arXiv:2502.16982, Appendix D); Kimi K2 bounds them so (arXiv:2507.20534).
These are plain functions on views of weights: who owns a model knows where its heads are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def largest_logits(query: Tensor, key: Tensor) -> Tensor:
    """The largest causal attention logit of each head, scaled by 1 / sqrt(head size): shape ``(heads,)``, fp32.

    Args:
        query: As attention multiplies it, rotary embedding applied: ``(windows, heads, tokens, head size)``.
        key: Likewise.
    """
    length = query.shape[-2]
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
    largest = query.new_full((query.shape[1],), -torch.inf, dtype=torch.float32)
    for one_query, one_key in zip(query, key, strict=True):  # a window at a time: scores are tokens x tokens
        scores = (one_query @ one_key.mT).float().masked_fill_(ahead, -torch.inf)
        largest = torch.maximum(largest, scores.amax(dim=(-2, -1)))
    return largest.div_(query.shape[-1] ** 0.5)


@torch.no_grad()
def clip_heads_(
    largest: Tensor, both: Sequence[Tensor], *, query_alone: Sequence[Tensor] = (), bound: float = 100.0
) -> Tensor:
    """Shrink the heads whose largest logit passed `bound`, so that it would have been `bound`.

    Args:
        largest: Largest logit of each head at this step, over all processes: ``(heads,)``.
        both: Weights of query and of key, as views ``(heads, head size, width)``: each takes the root of the factor.
        query_alone: Weights of query whose key is shared between heads and must stay (MLA's rotary part): the factor
            itself.
        bound: Kimi K2's tau.

    Returns:
        The factors, ``min(1, bound / largest)``.
    """
    factors = (bound / largest.clamp(min=bound)).view(-1, 1, 1)
    for weight in both:
        weight.mul_(factors.sqrt().to(weight.dtype))
    for weight in query_alone:
        weight.mul_(factors.to(weight.dtype))
    return factors.flatten()
