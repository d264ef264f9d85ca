"""Mixture of experts in the style of DeepSeek-V3 and Moonlight; with plain attention, of Mixtral.

No token is dropped and no expert has a capacity: tokens are sorted by expert and every expert multiplies its own, by
torch's grouped product where the device has it and by a loop where not. Both give the same numbers.

Letters in comments: N tokens, H width, E experts, K active ones, F hidden units of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.models.decoder import Attention, Decoder, FeedForward, Rotary
from scaling.models.latent import MultiHeadLatentAttention
from scaling.models.precision import autocast_dtype
from scaling.models.router import Router, sequence_loss
from scaling.spec import Mixture, ModelShape

ALIGNMENT = 16
"""Bytes that the grouped product wants a row to be a multiple of."""


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
    """As `loop_product`, in one kernel."""
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = F.grouped_mm(rows, stack.transpose(-2, -1), offs=ends)
    return product


def expert_product(rows: Tensor, stack: Tensor, counts: Tensor) -> Tensor:
    """As `loop_product`, by whichever road the device has."""
    return (grouped_product if has_grouped(rows, stack) else loop_product)(rows, stack, counts)


def has_grouped(rows: Tensor, stack: Tensor) -> bool:
    """Whether torch's grouped product takes these operands: its formats on this device, and rows of whole 16 bytes."""
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
        if (dtype := autocast_dtype(rows.device.type)) is not None:  # which does not know the grouped product
            rows, stacks = rows.to(dtype), [stack.to(dtype) for stack in stacks]
        gate, up, down = stacks
        hidden = F.silu(expert_product(rows, gate, counts)) * expert_product(rows, up, counts)
        return expert_product(hidden, down, counts)


class MixtureFeedForward(nn.Module):
    """Router, routed experts, and the experts that every token meets."""

    def __init__(self, shape: ModelShape, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.router = Router(shape.width, mixture)
        self.experts = Experts(mixture.experts, shape.width, shape.expert_width)
        if mixture.shared:
            self.shared = FeedForward(shape.width, mixture.shared * shape.expert_width)
        self.sequence_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, H)`` to ``(B, T, H)``."""
        flat = x.flatten(0, 1)  # (N, H)
        weights, chosen, scores = self.router(flat)
        counts = torch.zeros_like(self.router.load).scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        if self.training and torch.is_grad_enabled():  # an evaluation is no load and has nothing to minimise
            self.router.load += counts
            if self.mixture.sequence_loss:
                self.sequence_loss = sequence_loss(scores, self.mixture.active, len(x))
        order = chosen.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows: Tensor = _Dispatch.apply(flat, order, back, self.mixture.active)
        expert_output = self.experts(rows, counts)
        returned: Tensor = _Return.apply(expert_output, order, back)
        by_choice = returned.view(len(flat), self.mixture.active, -1)  # (N, K, H)
        mixed: Tensor = (by_choice * weights.unsqueeze(-1).to(by_choice.dtype)).sum(dim=1).view_as(x)
        if self.mixture.shared:
            mixed = mixed + self.shared(x)
        return mixed


class _Dispatch(torch.autograd.Function):
    """Each token once for each of its experts, sorted by expert; back, the sum over them in a fixed order.

    Plain indexing would add gradients up atomically on a GPU, and a run would not be the same twice.
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
    """Rows sorted by expert back in the order of tokens: a permutation, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[back]

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return given[order], None, None


class MixtureDecoder(Decoder):
    """A decoder with experts in all but its first layers, and latent attention where the shape has it."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self._imbalance: Tensor | None = None

    def make_rotary(self, shape: ModelShape) -> Rotary:
        """Over the channels of a head that carry position."""
        if shape.latent is None:
            return super().make_rotary(shape)
        return Rotary(shape.latent.rotary, shape.context, shape.latent.rope_base)

    def make_attention(self, shape: ModelShape) -> nn.Module:
        """Latent attention, or the plain one."""
        return Attention(shape) if shape.latent is None else MultiHeadLatentAttention(shape, shape.latent)

    def make_feed_forward(self, shape: ModelShape, layer: int) -> nn.Module:
        """Experts, or one feed-forward in the first layers."""
        if shape.mixture is None or layer < shape.mixture.dense_layers:
            return super().make_feed_forward(shape, layer)
        return MixtureFeedForward(shape, shape.mixture)

    def mixtures(self) -> list[MixtureFeedForward]:
        """The layers with experts, in order."""
        return [module for module in self.modules() if isinstance(module, MixtureFeedForward)]

    def auxiliary_loss(self) -> Tensor | None:
        """The sequence-wise balance loss of the last forward pass, summed over layers, with its weight."""
        terms = [mixture.sequence_loss for mixture in self.mixtures() if mixture.sequence_loss is not None]
        if not terms or self.shape.mixture is None:
            return None
        return self.shape.mixture.sequence_loss * torch.stack(terms).sum()

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
