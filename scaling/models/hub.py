"""The formats in which Hugging Face's ``transformers`` knows our model families: names of weights, and config.json.

A format lists its weights in the order of the model, each with ours that it is made of; a tensor is read from the run's
file only when it is written. Imports torch only then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from scaling.errors import UserError
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig

if TYPE_CHECKING:
    from torch import Tensor


def unchanged(*parts: Tensor) -> Tensor:
    """The only source, unchanged."""
    return parts[0]


@dataclass(frozen=True)
class HubWeight:
    """One weight of an exported model, by its name there."""

    name: str
    sources: tuple[str, ...]
    """Our weights that it is made of, in the order of the arguments of `make`."""
    make: Callable[..., Tensor] = unchanged
    expert: int | None = None
    """Number of the expert in a stack; None for a source that is no stack."""

    def read(self, file: Any) -> Tensor:
        """The tensor, from an open safetensors file; from a stack only the expert's matrix is read."""
        slices = [file.get_slice(name) for name in self.sources]
        parts = [part[:] if self.expert is None else part[self.expert : self.expert + 1][0] for part in slices]
        return self.make(*parts).contiguous()

    def elements(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Number of its entries."""
        return sum(math.prod(shapes[name][0 if self.expert is None else 1 :]) for name in self.sources)


@dataclass(frozen=True, kw_only=True)
class HubFormat:
    """One model family as ``transformers`` knows it."""

    weights: Callable[[ModelConfig], list[HubWeight]]
    """Its weights, in the order of the model."""
    config: Callable[[ModelConfig], dict[str, Any]]
    """Its config.json, without the ids of special tokens and the dtype. Refuses a shape that the format cannot express."""


def outside_blocks(shape: ModelConfig) -> list[HubWeight]:
    """Embedding, last norm and head, which have the same names in all formats; a tied head is not written."""
    weights = [
        HubWeight("model.embed_tokens.weight", ("embedding.weight",)),
        HubWeight("model.norm.weight", ("norm.weight",)),
    ]
    return weights if shape.tied else [*weights, HubWeight("lm_head.weight", ("head.weight",))]


DENSE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
LLAMA_ATTENTION = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
}
"""Modules of a block by our name; rotary halves have the same layout on both sides, so no weight is permuted."""


def _weight(layer: int, theirs: str, *ours: str, make: Callable[..., Tensor] = unchanged) -> HubWeight:
    """One weight of a block, by the names of the modules on both sides."""
    sources = tuple(f"blocks.{layer}.{module}.weight" for module in ours)
    return HubWeight(f"model.layers.{layer}.{theirs}.weight", sources, make)


def _feed_forward(layer: int, theirs: str, ours: str = "feed_forward") -> list[HubWeight]:
    return [_weight(layer, f"{theirs}.{there}", f"{ours}.{here}") for here, there in DENSE.items()]


def _experts(layer: int, theirs: str, experts: int, names: dict[str, str]) -> list[HubWeight]:
    return [
        HubWeight(
            f"model.layers.{layer}.{theirs}.{expert}.{there}.weight",
            (f"blocks.{layer}.feed_forward.experts.{here}",),
            expert=expert,
        )
        for expert in range(experts)
        for here, there in names.items()
    ]


def _shared_config(shape: ModelConfig, *, hidden: int) -> dict[str, Any]:
    """Entries of config.json that all formats have, `hidden` the width of the feed-forward or of an expert."""
    from scaling.models.decoder import NORM_EPSILON

    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": NORM_EPSILON,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
    }


def _rope(theta: float) -> dict[str, Any]:
    # The first is read by version 4 of transformers, the second by 5.
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def interleaved(rows: Tensor) -> Tensor:
    """Rotary rows ``(..., S, H)`` from the half-split order to the interleaved one."""
    import torch

    first, second = rows.chunk(2, dim=-2)
    return torch.stack([first, second], dim=-2).flatten(-3, -2)


def query_rows(query: Tensor, *, heads: int, nope: int) -> Tensor:
    """Queries with the rotary rows of every head interleaved."""
    import torch

    by_head = query.view(heads, -1, query.shape[-1])
    return torch.cat([by_head[:, :nope], interleaved(by_head[:, nope:])], dim=1).flatten(0, 1)


def latent_rows(latent: Tensor, position: Tensor) -> Tensor:
    """The projections to the latent and to the shared rotary key, stacked by rows."""
    import torch

    return torch.cat([latent, interleaved(position)], dim=0)


def key_value_rows(key: Tensor, value: Tensor, *, heads: int) -> Tensor:
    """Rows of keys and values, head by head."""
    import torch

    by_head = [rows.view(heads, -1, rows.shape[-1]) for rows in (key, value)]
    return torch.cat(by_head, dim=1).flatten(0, 1)


def _parts(shape: ModelConfig) -> tuple[MoEConfig, MLAConfig]:
    assert shape.moe is not None  # check_family has made sure of both
    assert shape.mla is not None
    return shape.moe, shape.mla


def deepseek_weights(shape: ModelConfig) -> list[HubWeight]:
    """Weights of a ``moonlight-moe`` model; routed experts one by one."""
    mixture, latent = _parts(shape)
    turned = partial(query_rows, heads=shape.heads, nope=latent.qk_nope_head_dim)
    both = partial(key_value_rows, heads=shape.heads)
    weights = outside_blocks(shape)
    for layer in range(shape.layers):
        weight = partial(_weight, layer)
        if latent.q_lora_rank is None:
            weights.append(weight("self_attn.q_proj", "attention.query", make=turned))
        else:
            weights += [
                weight("self_attn.q_a_proj", "attention.query_latent"),
                weight("self_attn.q_a_layernorm", "attention.query_norm"),
                weight("self_attn.q_b_proj", "attention.query", make=turned),
            ]
        weights += [
            weight("input_layernorm", "attention_norm"),
            weight("self_attn.kv_a_proj_with_mqa", "attention.latent", "attention.position", make=latent_rows),
            weight("self_attn.kv_a_layernorm", "attention.latent_norm"),
            weight("self_attn.kv_b_proj", "attention.key", "attention.value", make=both),
            weight("self_attn.o_proj", "attention.output"),
            weight("post_attention_layernorm", "feed_forward_norm"),
        ]
        if layer < mixture.dense_layers:
            weights += _feed_forward(layer, "mlp")
            continue
        bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        weights += [
            weight("mlp.gate", "feed_forward.router"),
            HubWeight(bias, (f"blocks.{layer}.feed_forward.router.bias",)),
            *_feed_forward(layer, "mlp.shared_experts", "feed_forward.shared"),
            *_experts(layer, "mlp.experts", mixture.num_experts, DENSE),
        ]
    return weights


LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def deepseek_config(shape: ModelConfig) -> dict[str, Any]:
    """Config.json of DeepSeek-V3.

    `scoring_func` and `topk_method` are for vLLM, which assumes softmax without the first and drops the bias without the
    second; transformers needs neither.

    Raises:
        UserError: The router is not DeepSeek-V3's, or no expert is shared.
    """
    from scaling.models.moe import scale_of

    mixture, latent = _parts(shape)
    if mixture.score != "sigmoid" or not mixture.num_shared_experts:
        raise UserError(
            f"no export: DeepseekV3ForCausalLM has sigmoid scores and at least one shared expert, and this model has "
            f"score = {mixture.score} and num_shared_experts = {mixture.num_shared_experts}. Train with sigmoid and num_shared_experts = 1 or more to export."
        )
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **_shared_config(shape, hidden=shape.ffn_width),
        "moe_intermediate_size": shape.expert_width,
        "n_routed_experts": mixture.num_experts,
        "n_shared_experts": mixture.num_shared_experts,
        "num_experts_per_tok": mixture.top_k,
        "first_k_dense_replace": mixture.dense_layers,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": scale_of(mixture),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "aux_loss_alpha": mixture.sequence_loss,
        "seq_aux": True,
        **{name: getattr(latent, name) for name in LATENT_SIZES},
        "head_dim": latent.qk_rope_head_dim,
        "rope_interleave": True,
        **_rope(latent.rope_theta),
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
    }


def mixtral_weights(shape: ModelConfig) -> list[HubWeight]:
    """Weights of a ``mixtral-moe`` model, upcycled ones among them."""
    assert shape.moe is not None
    weights = outside_blocks(shape)
    for layer in range(shape.layers):
        weights += [_weight(layer, theirs, ours) for ours, theirs in LLAMA_ATTENTION.items()]
        weights.append(_weight(layer, "block_sparse_moe.gate", "feed_forward.router"))
        numbered = {"gate": "w1", "up": "w3", "down": "w2"}
        weights += _experts(layer, "block_sparse_moe.experts", shape.moe.num_experts, numbered)
    return weights


def mixtral_config(shape: ModelConfig) -> dict[str, Any]:
    """Config.json of Mixtral.

    Raises:
        UserError: The model has a part that Mixtral lacks: a bias, shared experts, dense layers, or other scores.
    """
    from scaling.models.decoder import ROPE_BASE
    from scaling.models.moe import scale_of

    mixture = shape.moe
    assert mixture is not None
    wanted = {"score": "topk-softmax", "num_shared_experts": 0, "dense_layers": 0, "bias_update_rate": 0.0}
    other = {name: getattr(mixture, name) for name, value in wanted.items() if getattr(mixture, name) != value}
    if other or scale_of(mixture) != 1.0:
        found = (
            ", ".join(f"{name} = {value}" for name, value in other.items())
            or f"routed_scaling_factor = {scale_of(mixture):g}"
        )
        raise UserError(
            f"no export: MixtralForCausalLM has no {found}. It has score = topk-softmax, num_shared_experts = 0, "
            "dense_layers = 0, bias_update_rate = 0 and no scaling factor. Train with these to export, or use the family moonlight-moe."
        )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_shared_config(shape, hidden=shape.expert_width),
        "head_dim": shape.head_size,
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "sliding_window": None,
        **_rope(ROPE_BASE),
        "router_aux_loss_coef": 0.0,
    }


def llama_weights(shape: ModelConfig) -> list[HubWeight]:
    """Weights of a ``decoder`` model."""
    weights = outside_blocks(shape)
    for layer in range(shape.layers):
        weights += [_weight(layer, theirs, ours) for ours, theirs in LLAMA_ATTENTION.items()]
        weights += _feed_forward(layer, "mlp")
    return weights


def llama_config(shape: ModelConfig) -> dict[str, Any]:
    """Llama's config.json."""
    from scaling.models.decoder import ROPE_BASE

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_shared_config(shape, hidden=shape.ffn_width),
        "head_dim": shape.head_size,
        **_rope(ROPE_BASE),
        "attention_bias": False,
        "mlp_bias": False,
    }


LLAMA = HubFormat(weights=llama_weights, config=llama_config)
MIXTRAL = HubFormat(weights=mixtral_weights, config=mixtral_config)
DEEPSEEK_V3 = HubFormat(weights=deepseek_weights, config=deepseek_config)
