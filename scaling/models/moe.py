"""Mixture of experts: routing, grouped products, and the bias that balances the load without a loss.

Source: DeepSeek-V3 (arXiv:2412.19437, Section 2.1.2) with Moonlight's form of the update (arXiv:2502.16982, Section 3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.model_config import ModelConfig, MoEConfig
from scaling.models.decoder import Attention, Decoder, FeedForward, Rotary
from scaling.models.loss import autocast_dtype, without_autocast
from scaling.models.mla import MultiHeadLatentAttention


class Router(nn.Module):
    """Scores of experts, the top of them, and their weights. Letters: N tokens, H width, E experts, K chosen ones."""

    bias: Tensor
    """Added to the scores for the choice only, never to a weight; ``(E,)`` fp32, part of the state."""
    load: Tensor
    """Choices since the last optimizer step in this process; ``(E,)`` int64, zero whenever the state is saved."""

    def __init__(self, width: int, mixture: MoEConfig) -> None:
        super().__init__()
        self.mixture = mixture
        self.scale = scale_of(mixture)
        self.weight = nn.Parameter(torch.empty(mixture.num_experts, width))
        self.register_buffer("bias", torch.zeros(mixture.num_experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(mixture.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(N, H)`` to weights ``(N, K)``, experts ``(N, K)`` and all scores ``(N, E)``; in fp32 under any autocast."""
        with without_autocast(x.device.type):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.sigmoid() if self.mixture.score == "sigmoid" else logits.softmax(dim=-1)
            chosen = (scores.detach() + self.bias).topk(self.mixture.top_k, dim=-1).indices
            weights = scores.gather(-1, chosen)
            if self.mixture.score != "softmax-topk":
                # For softmax scores this is the softmax over the chosen logits.
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return weights * self.scale, chosen, scores

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower it above, by `bias_update_rate` each, keeping its mean.

        Args:
            load: Choices of one optimizer step over all processes and micro-batches, ``(E,)``. Only the sign of the
                distance to the mean counts, so a pass that is recomputed and counted twice changes nothing.
        """
        shortage = torch.sign(load.double().mean() - load.double())
        self.bias += self.mixture.bias_update_rate * (shortage - shortage.mean()).float()
        self.load.zero_()


def scale_of(mixture: MoEConfig) -> float:
    """The factor of the routing weights, stated or computed."""
    if mixture.routed_scaling_factor is not None:
        return mixture.routed_scaling_factor
    return routed_scaling_factor(mixture.num_experts, mixture.top_k) if mixture.score == "sigmoid" else 1.0


def sequence_loss(scores: Tensor, top_k: int, sequences: int) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss without its weight: 1 where the load of a sequence is even.

    The load counts the top experts by score alone, without the selection bias. Source: DeepSeek-V3, arXiv:2412.19437, Equations 17 to 20; the count is Equation 18.

    Args:
        scores: All scores, ``(N, E)``.
        top_k: Experts of a token, K.
        sequences: Number of sequences among the N tokens, B.
    """
    experts = scores.shape[-1]
    top = scores.detach().topk(top_k, dim=-1).indices.view(sequences, -1)  # (B, T * K)
    load = scores.new_zeros(sequences, experts).scatter_add_(1, top, torch.ones_like(top, dtype=scores.dtype))
    share = (scores / scores.sum(dim=-1, keepdim=True)).view(sequences, -1, experts).mean(dim=1)  # (B, E)
    return (load * (experts / top.shape[1]) * share).sum(dim=1).mean()


ALIGNMENT = 16
"""The grouped product needs rows of a multiple of this number of bytes."""


def loop_product(rows: Tensor, stack: Tensor, counts: Tensor) -> Tensor:
    """Rows times the matrix of their expert, one expert after another.

    Args:
        rows: ``(M, in)``, sorted by expert.
        stack: ``(E, out, in)``.
        counts: Rows of each expert, ``(E,)`` int64; some may have none.

    Returns:
        Shape ``(M, out)``.
    """
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, stack.unbind(), strict=True)])


def grouped_product(rows: Tensor, stack: Tensor, counts: Tensor) -> Tensor:
    """The product of `loop_product` in one kernel."""
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = F.grouped_mm(rows, stack.transpose(-2, -1), offs=ends)
    return product


def expert_product(rows: Tensor, stack: Tensor, counts: Tensor) -> Tensor:
    """The product of `loop_product` by the fastest way that the device supports."""
    return (grouped_product if has_grouped(rows, stack) else loop_product)(rows, stack, counts)


def has_grouped(rows: Tensor, stack: Tensor) -> bool:
    """True if torch's grouped product takes these operands: format, device, and rows of a multiple of 16 bytes."""
    aligned = all(size * stack.element_size() % ALIGNMENT == 0 for size in stack.shape[1:])
    if not aligned or not hasattr(F, "grouped_mm"):
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    return rows.device.type in ("cpu", "meta") and rows.dtype in (torch.float32, torch.bfloat16)


class Experts(nn.Module):
    """SwiGLU blocks as stacks of matrices, ``(E, out, in)``: what Muon orthogonalises slice by slice."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, hidden, width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``(M, H)`` rows sorted by expert to ``(M, H)``."""
        stacks: list[Tensor] = [self.gate, self.up, self.down]
        if (dtype := autocast_dtype(rows.device.type)) is not None:  # autocast does not cover the grouped product
            rows, stacks = rows.to(dtype), [stack.to(dtype) for stack in stacks]
        gate, up, down = stacks
        hidden = F.silu(expert_product(rows, gate, counts)) * expert_product(rows, up, counts)
        return expert_product(hidden, down, counts)


class MoEFeedForward(nn.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, shape: ModelConfig, mixture: MoEConfig) -> None:
        super().__init__()
        self.mixture = mixture
        self.router = Router(shape.width, mixture)
        self.experts = Experts(mixture.num_experts, shape.width, shape.expert_width)
        if mixture.num_shared_experts:
            self.shared = FeedForward(shape.width, mixture.num_shared_experts * shape.expert_width)
        self.sequence_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, H)`` to ``(B, T, H)``."""
        flat = x.flatten(0, 1)  # (N, H)
        weights, chosen, scores = self.router(flat)
        counts = torch.zeros_like(self.router.load).scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        if self.training and torch.is_grad_enabled():  # an evaluation counts no load and minimises nothing
            self.router.load += counts
            if self.mixture.sequence_loss:
                self.sequence_loss = sequence_loss(scores, self.mixture.top_k, len(x))
        # Sort the N * K choices by expert, so that each expert gets contiguous rows; `back` is the inverse permutation.
        order = chosen.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows: Tensor = _Dispatch.apply(flat, order, back, self.mixture.top_k)
        expert_output = self.experts(rows, counts)
        returned: Tensor = _Return.apply(expert_output, order, back)
        by_choice = returned.view(len(flat), self.mixture.top_k, -1)  # (N, K, H)
        mixed: Tensor = (by_choice * weights.unsqueeze(-1).to(by_choice.dtype)).sum(dim=1).view_as(x)
        if self.mixture.num_shared_experts:
            mixed = mixed + self.shared(x)
        return mixed


class _Dispatch(torch.autograd.Function):
    """A row of each token for each of its experts, sorted by expert; the gradient sums over them in a fixed order.

    Plain indexing would add up gradients by atomics on a GPU, and a run would not repeat itself.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, order: Tensor, back: Tensor, active: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.active = active
        return flat[order // active]

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return given[back].view(-1, ctx.active, given.shape[-1]).sum(dim=1), None, None, None


class _Return(torch.autograd.Function):
    """Rows sorted by expert, returned to the order of tokens: a permutation, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[back]

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return given[order], None, None


class MoEDecoder(Decoder):
    """A decoder with experts in all but its first layers, and latent attention where the shape has it."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__(shape)
        self._imbalance: Tensor | None = None

    def make_rotary(self, shape: ModelConfig) -> Rotary:
        """Rotary embedding of the channels that have position."""
        if shape.mla is None:
            return super().make_rotary(shape)
        return Rotary(shape.mla.qk_rope_head_dim, shape.context, shape.mla.rope_theta)

    def make_attention(self, shape: ModelConfig) -> nn.Module:
        """Latent attention where the shape has it, else plain attention."""
        return Attention(shape) if shape.mla is None else MultiHeadLatentAttention(shape, shape.mla)

    def make_feed_forward(self, shape: ModelConfig, layer: int) -> nn.Module:
        """Experts, or a dense feed-forward in the first layers."""
        if shape.moe is None or layer < shape.moe.dense_layers:
            return super().make_feed_forward(shape, layer)
        return MoEFeedForward(shape, shape.moe)

    def mixtures(self) -> list[MoEFeedForward]:
        """The layers with experts, in order."""
        return [module for module in self.modules() if isinstance(module, MoEFeedForward)]

    def auxiliary_loss(self) -> Tensor | None:
        """The sequence-wise balance loss of the last forward pass, summed over layers, with its weight."""
        terms = [mixture.sequence_loss for mixture in self.mixtures() if mixture.sequence_loss is not None]
        if not terms or self.shape.moe is None:
            return None
        return self.shape.moe.sequence_loss * torch.stack(terms).sum()

    def end_of_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Move the biases by the load of all processes and micro-batches of this step."""
        mixtures = self.mixtures()
        loads = total(torch.stack([mixture.router.load for mixture in mixtures]))  # (layers, E)
        for mixture, load in zip(mixtures, loads, strict=True):
            mixture.router.update_bias(load)
        self._imbalance = (loads.amax(dim=1) / loads.double().mean(dim=1)).amax()

    def load_imbalance(self) -> float | None:
        """Load of the busiest expert over the mean, in the worst layer of the last step; 1 is even."""
        return None if self._imbalance is None else float(self._imbalance)


DRAWS = 100_000
"""Routings in the mean, which moves by less than 1e-4 with other draws."""


@functools.cache
def routed_scaling_factor(experts: int, top_k: int) -> float:
    """Mean of ``1 / ||p||`` over routings of standard normal logits, to three decimals.

    `p` are the sigmoid scores of the `top_k` largest logits, divided by their sum. Independent outputs of equal size,
    weighted by `p`, add up to ``||p||`` times that size. 64 experts with a top_k of 6 give 2.446.
    Source: Moonlight, arXiv:2502.16982, Appendix C.
    """
    logits = np.random.Generator(np.random.PCG64(0)).standard_normal((DRAWS, experts))
    chosen = 1 / (1 + np.exp(-np.partition(logits, experts - top_k, axis=1)[:, experts - top_k :]))
    weights = chosen / chosen.sum(axis=1, keepdims=True)
    return round(float((1 / np.linalg.norm(weights, axis=1)).mean()), 3)
