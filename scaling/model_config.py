"""The model of a run: its size, and the options of experts and of latent attention. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from scaling.errors import UserError
from scaling.io import MAX_NUMBER, Layers, NonNegative, NonNegativeFloat, PositiveFloat, Size, Strict


def ffn_width(width: int, multiple: int) -> int:
    """Hidden units of a SwiGLU block: ``8 * width / 3`` rounded up to a multiple.

    Source: Llama's rule; with ``multiple`` 256 it gives Moonlight's parameter counts to the printed digit
    (arXiv:2502.16982, Table 2).
    """
    return -(-8 * width // (3 * multiple)) * multiple


class MoEConfig(Strict, frozen=True):
    """Experts in place of the feed-forward: their number, their routing, and how their load is balanced."""

    num_experts: Size
    """Routed experts of a layer."""
    top_k: Size
    """Routed experts that process a token."""
    num_shared_experts: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 0
    """Experts that process every token, beside the routed ones."""
    dense_layers: NonNegative = 0
    """Number of first layers with a dense feed-forward."""
    granularity: Size = 1
    """An expert's hidden units are the shape's `ffn_width` divided by this."""
    score: Literal["sigmoid", "topk-softmax", "softmax-topk"] = "sigmoid"
    """``sigmoid``: DeepSeek-V3's, chosen scores divided by their sum; ``topk-softmax``: softmax over the chosen logits, so
    that equal experts act as one feed-forward; ``softmax-topk``: softmax over all logits, not normalised again."""
    routed_scaling_factor: PositiveFloat | None = None
    """Factor of the routing weights. None: computed for sigmoid (`scaling.models.moe.routed_scaling_factor`), else 1."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """Step of the selection bias, by the sign of an expert's shortage (Moonlight, Section 3.3); 0 keeps it at zero."""
    sequence_loss: NonNegativeFloat = 0.0
    """Weight of DeepSeek-V3's sequence-wise balance loss in training; it is never part of a reported loss."""

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise UserError(
                f"top_k = {self.top_k} is more than the {self.num_experts} experts. Use top_k = {self.num_experts} or fewer."
            )


class MLAConfig(Strict, frozen=True):
    """Multi-head latent attention with decoupled rotary channels (DeepSeek-V2, arXiv:2405.04434, Section 2.1)."""

    kv_lora_rank: Size
    """Channels of the latent from which keys and values are computed."""
    qk_nope_head_dim: Size
    """Channels of a query or key head without position."""
    qk_rope_head_dim: Size
    """Channels of a query head with position; all key heads of a token share one such part."""
    v_head_dim: Size
    """Channels of a value head."""
    q_lora_rank: Size | None = None
    """Channels of the latent from which queries are computed; None computes them from the whole width, as Moonlight."""
    rope_theta: Annotated[float, msgspec.Meta(gt=1.0, le=MAX_NUMBER)] = 50_000.0

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} is odd, and rotary embedding rotates pairs. Use {self.qk_rope_head_dim + 1}."
            )


class ModelConfig(Strict, frozen=True):
    """Shape of a model of any family; the built-in ones are Llama-like decoders, with experts or latent attention.

    Raises:
        UserError: The heads do not divide the width, the head size is odd (RoPE rotates pairs), or the experts do not fit.
    """

    layers: Layers
    width: Size
    heads: Size
    vocabulary: Size
    context: Size
    ffn_multiple: Size = 256
    tied: bool = False
    family: str = "decoder"
    ffn: Size | None = None
    """Hidden units of the feed-forward; None takes 8/3 of the width, rounded up to a multiple of `ffn_multiple`."""
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    family_options: dict[str, float | int | bool | str] | None = None
    """Options that only this family has, as its row of ``scaling.models.registry.FAMILIES`` types them."""

    def __hash__(self) -> int:
        """Equal shapes have equal hashes; the generated one cannot take the dictionary of options."""
        return hash(msgspec.json.encode(self, order="sorted"))

    def __post_init__(self) -> None:
        if self.moe is not None:
            self._check_mixture(self.moe)
        if self.mla is not None:
            return  # its head sizes do not depend on the width
        if self.width % self.heads:
            fitting = (n for n in range(1, self.width + 1) if self.width % n == 0 and self.width // n % 2 == 0)
            best = min(fitting, key=lambda heads: abs(heads - self.heads), default=1)
            raise UserError(
                f"width {self.width} is not a multiple of heads {self.heads}. "
                f"Use {best} heads of size {self.width // best}, or a width that {self.heads} divides."
            )
        if (self.width // self.heads) % 2:
            raise UserError(
                f"width {self.width} with {self.heads} heads gives heads of odd size {self.width // self.heads}, "
                "and rotary embedding rotates pairs. Use an even head size."
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """Hidden units of the feed-forward."""
        return self.ffn or ffn_width(self.width, self.ffn_multiple)

    @property
    def expert_width(self) -> int:
        """Hidden units of one expert."""
        return self.ffn_width // (self.moe.granularity if self.moe else 1)

    def _check_mixture(self, mixture: MoEConfig) -> None:
        if self.ffn_width % mixture.granularity:
            raise UserError(
                f"granularity {mixture.granularity} does not divide the {self.ffn_width} hidden units of the feed-forward. "
                f"Use an ffn_multiple that it divides, such as {mixture.granularity * 8}."
            )
        if mixture.dense_layers >= self.layers:
            raise UserError(
                f"dense_layers {mixture.dense_layers} leaves none of the {self.layers} layers for experts. "
                "Use fewer dense layers, or the family decoder."
            )
