"""Which experts a token meets, with what weight, and the bias that keeps their load even without a loss.

Source: DeepSeek-V3 (arXiv:2412.19437, Section 2.1.2) with Moonlight's form of the update (arXiv:2502.16982, Section 3.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.models.gate import gate_scale
from scaling.models.precision import without_autocast
from scaling.spec import Mixture


class Router(nn.Module):
    """Scores of experts, the top of them, and their weights. Letters: N tokens, H width, E experts, K active ones."""

    bias: Tensor
    """Added to the scores for the choice alone, never to a weight; ``(E,)`` fp32, part of the state."""
    load: Tensor
    """Choices since the last optimizer step in this process; ``(E,)`` int64, zero whenever the state is saved."""

    def __init__(self, width: int, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.scale = scale_of(mixture)
        self.weight = nn.Parameter(torch.empty(mixture.experts, width))
        self.register_buffer("bias", torch.zeros(mixture.experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(mixture.experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(N, H)`` to weights ``(N, K)``, experts ``(N, K)`` and all scores ``(N, E)``; in fp32 whatever the autocast."""
        with without_autocast(x.device.type):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.sigmoid() if self.mixture.score == "sigmoid" else logits.softmax(dim=-1)
            chosen = (scores.detach() + self.bias).topk(self.mixture.active, dim=-1).indices
            weights = scores.gather(-1, chosen)
            if self.mixture.score != "softmax-topk":
                # For softmax scores this is the softmax over the chosen logits.
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return weights * self.scale, chosen, scores

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower it above, by `bias_rate` each, keeping its mean.

        Args:
            load: Choices of one optimizer step over all processes and micro-batches, ``(E,)``. Only the sign of the
                distance to the mean counts, so a pass that is recomputed and counted twice changes nothing.
        """
        shortage = torch.sign(load.double().mean() - load.double())
        self.bias += self.mixture.bias_rate * (shortage - shortage.mean()).float()
        self.load.zero_()


def scale_of(mixture: Mixture) -> float:
    """The gate scaling factor of a mixture, stated or computed."""
    if mixture.gate_scale is not None:
        return mixture.gate_scale
    return gate_scale(mixture.experts, mixture.active) if mixture.score == "sigmoid" else 1.0


def sequence_loss(scores: Tensor, active: int, sequences: int) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss without its weight: 1 where the load of a sequence is even.

    The load counts the top experts by score alone: the selection bias, which balances the load by itself, has no part
    in it. Source: DeepSeek-V3, arXiv:2412.19437, Equations 17 to 20; the count is Equation 18.

    Args:
        scores: All scores, ``(N, E)``.
        active: Experts that a token meets, K.
        sequences: Sequences that the N tokens are, B.
    """
    experts = scores.shape[-1]
    top = scores.detach().topk(active, dim=-1).indices.view(sequences, -1)  # (B, T * K)
    load = scores.new_zeros(sequences, experts).scatter_add_(1, top, torch.ones_like(top, dtype=scores.dtype))
    share = (scores / scores.sum(dim=-1, keepdim=True)).view(sequences, -1, experts).mean(dim=1)  # (B, E)
    return (load * (experts / top.shape[1]) * share).sum(dim=1).mean()
