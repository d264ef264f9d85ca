"""Parameters by part and training FLOPs per token, under conventions with names.

Papers count differently, and the count moves the match ratio (Moonlight's 0.519 becomes 0.51 to 0.55), so every number
of FLOPs has the name of its convention beside it. tests/scaling/test_flops.py checks that the formulas give exactly the
count of torch's FlopCounterMode on the meta device. Imports no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from scaling.errors import UserError, unknown_name
from scaling.io import Strict
from scaling.model_config import ModelConfig
from scaling.models.registry import FAMILIES, check_family
from scaling.models.weights import Weights


class ParamCount(Strict, frozen=True):
    """Parameters by part. What a paper calls N is `blocks`, `without_embedding` or `total`: it must say which."""

    embedding: int
    """The input embedding, which is looked up and never multiplied."""
    blocks: int
    """Matrices of attention and feed-forward with all experts: Moonlight's N."""
    head: int
    """The output matrix; the embedding once more where the two are tied."""
    norms: int
    tied: bool
    idle: int = 0
    """Parameters of the routed experts that do not process a token."""

    @property
    def activated(self) -> int:
        """Matrices of the blocks that process one token: all of them in a dense model."""
        return self.blocks - self.idle

    @property
    def matmul(self) -> int:
        """Parameters that multiply a token: activated blocks and head."""
        return self.activated + self.head

    @property
    def without_embedding(self) -> int:
        """All parameters except the input embedding; a tied head counts as the embedding."""
        return self.blocks + self.norms + (0 if self.tied else self.head)

    @property
    def total(self) -> int:
        """Parameters that are stored."""
        return self.without_embedding + self.embedding


def count_parameters(shape: ModelConfig) -> ParamCount:
    """Parameters of a shape by part, summed over the shapes that its family declares.

    Source: the blocks of a dense model are ``layers * (4 * width**2 + 3 * width * ffn_width)``, which returns
    Moonlight's five sizes (339.7M, 545.9M, 822.1M, 1146.6M, 1586.0M) from the depths and widths of its Table 2; with
    experts and latent attention the same sum returns its 15.29B and 2.24B activated (Section 3.3).
    """
    return _count(check_family(shape).weights, shape)


class DepthLine(NamedTuple):
    """Matrix parameters of the blocks as a line in the number of layers."""

    first: int
    """Fewest layers that the shape can have."""
    shallowest: int
    """Parameters of the blocks at that depth."""
    per_layer: int
    """Parameters of each further layer."""

    def blocks(self, layers: int) -> int:
        """Parameters of the blocks at a depth of at least `first`."""
        return self.shallowest + (layers - self.first) * self.per_layer


def depth_line(shape: ModelConfig) -> DepthLine:
    """Parameters of the blocks at any depth, counted in the second shallowest model that the shape can have.

    Layers after the first ``dense_layers`` are alike, so the count is a line. A search over depths and widths need not
    sum over every layer of every candidate.
    """
    first = 1 + (shape.moe.dense_layers if shape.moe else 0)
    weights = check_family(shape).weights(msgspec.structs.replace(shape, layers=first + 1))
    sizes = {name: math.prod(size) for name, size in weights.items() if name.startswith("blocks.") and len(size) > 1}
    last = sum(size for name, size in sizes.items() if name.startswith(f"blocks.{first}."))
    return DepthLine(first, sum(sizes.values()) - last, last)


@functools.lru_cache(maxsize=4096)
def _count(declare: Callable[[ModelConfig], Weights], shape: ModelConfig) -> ParamCount:
    weights = declare(shape)
    sizes = {name: math.prod(size) for name, size in weights.items()}
    norms = sum(size for name, size in sizes.items() if len(weights[name]) == 1)
    embedding, head = sizes["embedding.weight"], sizes.get("head.weight", 0)
    idle = 0
    if (mixture := shape.moe) is not None:
        experts = sum(size for name, size in sizes.items() if len(weights[name]) == 3)
        idle = experts // mixture.num_experts * (mixture.num_experts - mixture.top_k)
    return ParamCount(
        embedding=embedding,
        blocks=sum(sizes.values()) - embedding - head - norms,
        head=head or embedding,
        norms=norms,
        tied=not head,
        idle=idle,
    )


def _with_attention(shape: ModelConfig, per_channel: int) -> int:
    channels = FAMILIES.row(shape.family).attention_channels(shape)
    return 6 * count_parameters(shape).matmul + per_channel * shape.layers * channels * shape.context


CONVENTIONS: dict[str, Callable[[ModelConfig], int]] = {
    # Kaplan's and Moonlight's C = 6ND: N without embedding and head, no attention (arXiv:2502.16982, App. B); with
    # experts, the N that processes a token.
    "6nd": lambda shape: 6 * count_parameters(shape).activated,
    # Every weight that multiplies: the head counts, the look-up does not.
    "matmul": lambda shape: 6 * count_parameters(shape).matmul,
    # Also scores and mixing of causal attention, half of the full square.
    "attention": lambda shape: _with_attention(shape, 3),
    # Also the other half, as PaLM's MFU counts it (arXiv:2204.02311, App. B): 12 * layers * width * context when
    # queries and values are as wide as the model.
    "attention-full": lambda shape: _with_attention(shape, 6),
}
"""FLOPs of forward and backward per token in a full context, by the name of the convention."""


def train_flops_per_token(shape: ModelConfig, convention: str = "6nd") -> int:
    """Forward and backward FLOPs of one token."""
    if convention not in CONVENTIONS:
        raise UserError(unknown_name("FLOP convention", convention, CONVENTIONS))
    return CONVENTIONS[convention](shape)


def train_flops(shape: ModelConfig, tokens: int, convention: str = "6nd") -> int:
    """Training FLOPs of a run: `tokens` times `train_flops_per_token`."""
    return tokens * train_flops_per_token(shape, convention)
