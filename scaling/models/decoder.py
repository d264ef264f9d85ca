"""A Llama-like decoder in plain PyTorch: pre-norm RMSNorm, rotary embedding, SwiGLU, multi-head attention, no biases.

Query, key and value are separate matrices because Muon orthogonalises a matrix as a whole: a fused one would be
another algorithm (Moonlight, arXiv:2502.16982; the author on splitting: Megatron-LM PR 1428).

Letters in comments: B sequences, T tokens of a sequence, H width, V vocabulary, A heads, S head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaling.model_config import ModelConfig
from scaling.models.loss import ChunkLoss, loss_and_gradient, next_token_loss

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-5
RESIDUAL_WRITERS = ("attention.output.weight", "feed_forward.down.weight", "shared.down.weight", "experts.down")
"""Suffixes of the names of matrices that write to the residual stream."""


class Rotary(nn.Module):
    """Rotary position embedding in the half-split layout of Hugging Face's Llama."""

    def __init__(self, head_size: int, context: int, base: float = ROPE_BASE) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)  # (T, S / 2)
        # Functions of the shape alone, so they are not part of the state.
        self.register_buffer("cosine", angles.cos().float().repeat(1, 2), persistent=False)  # (T, S)
        self.register_buffer("sine", torch.cat([-angles.sin(), angles.sin()], dim=1).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``(B, A, T, S)`` by position."""
        # For the pair (x1, x2) of the two halves: (x1 cos - x2 sin, x2 cos + x1 sin).
        length = x.shape[-2]
        swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
        cosine: Tensor = self.get_buffer("cosine")[:length].to(x.dtype)
        sine: Tensor = self.get_buffer("sine")[:length].to(x.dtype)
        return x * cosine + swapped * sine


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """``(B, T, H)`` to ``(B, T, H)``."""
        batch, length, width = x.shape
        query, key, value = (
            projection(x).view(batch, length, self.heads, -1).transpose(1, 2)  # (B, A, T, S)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
        projected: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to ``(..., H)``."""
        projected: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return projected


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, width: int, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """``(B, T, H)`` to ``(B, T, H)``."""
        x = x + self.attention(self.attention_norm(x), rotary)
        mixed: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return mixed


class Decoder(nn.Module):
    """The whole model. `initialise` sets the weights, not torch's defaults.

    A family with other parts overrides `make_rotary`, `make_attention` and `make_feed_forward`.
    """

    recompute = False
    """Recompute the activations inside a block in the backward pass instead of keeping them."""
    chunk_loss: ChunkLoss = staticmethod(loss_and_gradient)

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.rotary = self.make_rotary(shape)
        self.blocks = nn.ModuleList(
            Block(shape.width, self.make_attention(shape), self.make_feed_forward(shape, layer))
            for layer in range(shape.layers)
        )
        self.norm = nn.RMSNorm(shape.width, eps=NORM_EPSILON)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:  # one parameter, under the name of the embedding
            self.head.weight = self.embedding.weight

    def make_rotary(self, shape: ModelConfig) -> Rotary:
        """The position embedding that all blocks share."""
        return Rotary(shape.head_size, shape.context)

    def make_attention(self, shape: ModelConfig) -> nn.Module:
        """Attention of one block."""
        return Attention(shape)

    def make_feed_forward(self, shape: ModelConfig, layer: int) -> nn.Module:
        """Feed-forward of block `layer`."""
        return FeedForward(shape.width, shape.ffn_width)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of the next token, ``(B, T)`` int64 to ``(B, T, V)``; with targets ``(B, T)`` the mean loss instead."""
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, self.rotary, use_reentrant=False)
            else:
                x = block(x, self.rotary)  # (B, T, H)
        x = self.norm(x)
        if targets is None:
            logits: Tensor = self.head(x)
            return logits
        return next_token_loss(x.flatten(0, 1), self.head.weight, targets.flatten(), chunk_loss=self.chunk_loss)

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean next-token loss in nats of sequences ``(B, T + 1)``; a scalar, in fp32 under any autocast."""
        # By the module's call, because the hooks that gather sharded weights run there.
        loss: Tensor = self(sequences[:, :-1], sequences[:, 1:])
        return loss

    def auxiliary_loss(self) -> Tensor | None:
        """Term added to the loss of the last forward pass in training, never reported; None in a dense model."""
        return None

    def end_of_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Hook of a family at each step boundary; `total` sums a tensor over processes. A dense model does nothing."""

    def load_imbalance(self) -> float | None:
        """Load of the busiest expert over the mean, in the worst layer of the last step; None in a dense model."""
        return None

    def saved_tensors(self) -> dict[str, Tensor]:
        """Tensors of a weights file by name: no second name of a tied head, no buffer that follows from the shape."""
        state: dict[str, Tensor] = self.state_dict()
        return {name: state[name] for name, _ in [*self.named_parameters(), *self.named_buffers()] if name in state}

    def compile_in_place(self, *, whole: bool, graphs: bool = False) -> None:
        """Compile without a wrapper, which would prefix every name in the state.

        Args:
            whole: Compile model and loss as one: the fewest launches, which bound a small model's step. Otherwise block
                by block: compiled once for all layers, and sharded weights can be gathered between them.
            graphs: On a GPU, with `whole`: replay the kernels as CUDA graphs, one launch for all of them.
        """
        if whole:
            self.compile(mode="reduce-overhead" if graphs else None)
            return
        for block in self.blocks:
            block.compile()
        self.chunk_loss = torch.compile(loss_and_gradient)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights on the CPU from one generator, so that both arms of a pair start from the same weights.

        Matrices are normal with variance 1 / inputs (0.022 at width 2048, near the field's usual 0.02, and right at
        width 32 too); those that write to the residual stream are smaller by sqrt(2 * layers), as in GPT-2. Norms
        start at 1, embeddings at a standard deviation of 0.02.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            deviation = 0.02 if name == "embedding.weight" else parameter.shape[-1] ** -0.5
            if name.endswith(RESIDUAL_WRITERS):
                deviation /= (2 * self.shape.layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
