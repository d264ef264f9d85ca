"""Shapes of a model's parameters by name, declared without torch.

Parameters, FLOPs and the optimizer's FLOPs are counted from these shapes before any model is built;
`scaling.models.registry.build_model` compares them with the model.
"""

from __future__ import annotations

from scaling.model_config import ModelConfig

Weights = dict[str, tuple[int, ...]]


def decoder_weights(shape: ModelConfig) -> Weights:
    """Parameters of `scaling.models.decoder` and `scaling.models.moe`; experts as one stack ``(E, out, in)`` a layer."""
    width, mixture = shape.width, shape.moe
    found: Weights = {"embedding.weight": (shape.vocabulary, width), "norm.weight": (width,)}
    if not shape.tied:
        found["head.weight"] = (shape.vocabulary, width)
    for layer in range(shape.layers):
        block = f"blocks.{layer}."
        found |= {f"{block}{name}.weight": (width,) for name in ("attention_norm", "feed_forward_norm")}
        found |= {f"{block}attention.{name}.weight": size for name, size in _attention(shape).items()}
        place = f"{block}feed_forward."
        if mixture is None or layer < mixture.dense_layers:
            found |= {f"{place}{name}.weight": size for name, size in _gated(width, shape.ffn_width).items()}
            continue
        found[f"{place}router.weight"] = (mixture.num_experts, width)
        expert = _gated(width, shape.expert_width)
        found |= {f"{place}experts.{name}": (mixture.num_experts, *size) for name, size in expert.items()}
        if mixture.num_shared_experts:
            shared = _gated(width, mixture.num_shared_experts * shape.expert_width)
            found |= {f"{place}shared.{name}.weight": size for name, size in shared.items()}
    return found


def attention_channels(shape: ModelConfig) -> int:
    """Channels of all heads of one layer that scores and mixing multiply: queries' and values'.

    Fewer key and value heads change nothing here: each query head multiplies keys and values of its own size.
    """
    if shape.mla is None:
        return 2 * shape.width
    return shape.heads * (shape.mla.qk_nope_head_dim + shape.mla.qk_rope_head_dim + shape.mla.v_head_dim)


def _gated(width: int, hidden: int) -> Weights:
    return {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}


def _attention(shape: ModelConfig) -> Weights:
    width, latent = shape.width, shape.mla
    if latent is None:
        return dict.fromkeys(("query", "key", "value", "output"), (width, width))
    found: Weights = {
        "latent": (latent.kv_lora_rank, width),
        "latent_norm": (latent.kv_lora_rank,),
        "position": (latent.qk_rope_head_dim, width),
        "key": (shape.heads * latent.qk_nope_head_dim, latent.kv_lora_rank),
        "value": (shape.heads * latent.v_head_dim, latent.kv_lora_rank),
        "output": (width, shape.heads * latent.v_head_dim),
        "query": (shape.heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim), latent.q_lora_rank or width),
    }
    if latent.q_lora_rank is not None:
        found |= {"query_latent": (latent.q_lora_rank, width), "query_norm": (latent.q_lora_rank,)}
    return found
