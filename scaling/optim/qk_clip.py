"""QK-clip: after a step, query and key weights of a head are shrunk if its largest attention logit passed a bound.

Moonlight saw logits above 100 under Muon (arXiv:2502.16982, Appendix D); Kimi K2 bounds them so (arXiv:2507.20534).
These are plain functions on views of weights: who owns a model knows where its heads are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scaling.models.decoder import Attention


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
    factors = torch.where(largest > bound, bound / largest, 1.0).view(-1, 1, 1)
    for weight in both:
        weight.mul_(factors.sqrt().to(weight.dtype))
    for weight in query_alone:
        weight.mul_(factors.to(weight.dtype))
    return factors.flatten()


@contextlib.contextmanager
def observed_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The largest logit of each head, by the name of its attention, over the forward passes inside the block.

    It recomputes query and key of every `scaling.models.decoder.Attention` and costs about as much as the attention,
    so it belongs at chosen steps. Over processes, reduce with the maximum.
    """
    largest: dict[str, Tensor] = {}

    def before(name: str, attention: Attention, inputs: tuple[Any, ...]) -> None:
        x, rotary = inputs
        with torch.no_grad():
            query, key = (
                rotary(projection(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2))
                for projection in (attention.query, attention.key)
            )
            found = largest_logits(query, key)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Attention):
                hook = module.register_forward_pre_hook(
                    lambda attention, inputs, name=name: before(name, attention, inputs)
                )
                stack.callback(hook.remove)
        yield largest


def clip_attention_(model: nn.Module, largest: dict[str, Tensor], *, bound: float = 100.0) -> int:
    """QK-clip of a model after a step, from what `observed_logits` saw; returns how many heads were clipped."""
    clipped = 0
    for name, seen in largest.items():
        attention = model.get_submodule(name)
        assert isinstance(attention, Attention)
        weights = (attention.query.weight, attention.key.weight)
        heads = [weight.view(attention.heads, -1, weight.shape[1]) for weight in weights]
        clipped += int((clip_heads_(seen, heads, bound=bound) < 1).sum())
    return clipped
