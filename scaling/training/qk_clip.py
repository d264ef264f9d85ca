"""QK-clip: after a step, query and key weights of heads whose attention logits exceed a bound are scaled down.

Moonlight observed logits above 100 under Muon (arXiv:2502.16982, Appendix D); Kimi K2 bounds them so (arXiv:2507.20534).
A head whose largest logit is ``s`` gets the factor ``min(1, bound / s)``. Query and key each take its square root. In
latent attention the heads share the rotary part of the key, which stays, so the rotary part of the query takes the whole
factor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from scaling.models.decoder import Attention
from scaling.models.mla import MultiHeadLatentAttention


@torch.no_grad()
def largest_logits(query: Tensor, key: Tensor) -> Tensor:
    """The largest causal attention logit of each head, scaled by 1 / sqrt(head size): shape ``(heads,)``, fp32.

    Args:
        query: Shape ``(sequences, heads, tokens, head size)``, with rotary embedding applied.
        key: The same shape.
    """
    length = query.shape[-2]
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
    largest = query.new_full((query.shape[1],), -torch.inf, dtype=torch.float32)
    for one_query, one_key in zip(query, key, strict=True):  # one sequence at a time: (heads, tokens, tokens)
        scores = (one_query @ one_key.mT).float().masked_fill_(ahead, -torch.inf)
        largest = torch.maximum(largest, scores.amax(dim=(-2, -1)))
    return largest.div_(query.shape[-1] ** 0.5)


def _query_and_key(attention: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Query and key of an attention for its inputs, each of shape ``(sequences, heads, tokens, channels)``."""
    x, rotary = inputs
    if isinstance(attention, MultiHeadLatentAttention):
        return attention.query_and_key(x, rotary)
    assert isinstance(attention, Attention)
    query, key = (
        rotary(projection(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2))
        for projection in (attention.query, attention.key)
    )
    return query, key


@contextlib.contextmanager
def observed_logits(model: nn.Module, *, training_only: bool = False) -> Iterator[dict[str, Tensor]]:
    """Context that observes the largest logit of each head, by the name of its attention, over all forward passes.

    It recomputes query and key of every attention, which costs about as much as the attention itself. It observes
    nothing in a compiled model. Over processes, reduce with the maximum.

    Args:
        model: A model with the attentions of `scaling.models`.
        training_only: Skip passes without gradient.

    Yields:
        Logits of shape ``(heads,)`` per attention; updated by each pass.
    """
    largest: dict[str, Tensor] = {}

    def before(name: str, attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        if training_only and not torch.is_grad_enabled():
            return
        with torch.no_grad():
            found = largest_logits(*_query_and_key(attention, inputs))
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Attention | MultiHeadLatentAttention):
                hook = module.register_forward_pre_hook(
                    lambda attention, inputs, name=name: before(name, attention, inputs)
                )
                stack.callback(hook.remove)
        yield largest


@torch.no_grad()
def clip_attention_(model: nn.Module, largest: dict[str, Tensor], *, bound: float = 100.0) -> int:
    """Scale the heads whose largest logit exceeds `bound` so that it would have been `bound`.

    Args:
        model: Its weights, whole or sharded by rows, change in place.
        largest: Result of `observed_logits` at this step, over all processes.
        bound: Kimi K2's tau.

    Returns:
        Number of clipped heads.
    """
    clipped = []
    for name, logits in largest.items():
        attention = model.get_submodule(name)
        factors = torch.where(logits > bound, bound / logits, 1.0)  # (heads,)
        for weight, by_row in _row_factors(attention, factors):
            _scale_rows_(weight, by_row)
        clipped.append((factors < 1).sum())
    return int(torch.stack(clipped).sum())


def _row_factors(attention: nn.Module, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Query and key weights of an attention, each with a factor per row."""
    root = factors.sqrt()
    if isinstance(attention, MultiHeadLatentAttention):
        sizes = attention.sizes
        query = torch.cat(
            [root[:, None].expand(-1, sizes.qk_nope_head_dim), factors[:, None].expand(-1, sizes.qk_rope_head_dim)],
            dim=1,
        )
        return [
            (attention.query.weight, query.flatten()),
            (attention.key.weight, root.repeat_interleave(sizes.qk_nope_head_dim)),
        ]
    assert isinstance(attention, Attention)
    weights = (attention.query.weight, attention.key.weight)
    return [(weight, root.repeat_interleave(weight.shape[0] // attention.heads)) for weight in weights]


def _scale_rows_(weight: Tensor, by_row: Tensor) -> None:
    scale = by_row.to(weight.dtype).unsqueeze(1)
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        scale = DTensor.from_local(scale, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.mul_(scale)


class QkClip:
    """QK-clip during training: `start` observes the training passes, `after_step` clips.

    Attributes:
        clipped: Heads that were clipped so far, counted once per step.
    """

    def __init__(self, bound: float) -> None:
        self.bound, self.clipped = bound, 0
        self._largest: dict[str, Tensor] = {}
        self._model: nn.Module | None = None
        self._hooks = contextlib.ExitStack()

    def start(self, model: nn.Module) -> None:
        """Observe every training pass of a model."""
        self._model, self._largest = model, self._hooks.enter_context(observed_logits(model, training_only=True))

    def stop(self) -> None:
        """Remove the hooks from the model."""
        self._hooks.close()

    def after_step(self, maximum: Callable[[Tensor], Tensor]) -> None:
        """Clip by the logits of the step's batch; `maximum` is the elementwise maximum over processes."""
        assert self._model is not None
        names = sorted(self._largest)
        logits = maximum(torch.stack([self._largest[name] for name in names]))  # (attentions, heads)
        self.clipped += clip_attention_(self._model, dict(zip(names, logits, strict=True)), bound=self.bound)
        self._largest.clear()
