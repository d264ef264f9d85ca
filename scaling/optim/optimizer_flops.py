"""What the optimizer itself costs, in FLOPs, beside those of the model. No torch.

Counted are matrix products, two FLOPs for a multiplication and addition, by the mathematics: symmetric products are
counted whole, so that the number does not depend on the machine. AdamW multiplies no matrices. The count grows with
steps and not with tokens: negligible at Moonlight's batches (below one per cent of 6ND), a third of a small run's.
"""

from __future__ import annotations

from collections.abc import Mapping

from scaling.optim.newton_schulz.coefficients import newton_schulz_flops
from scaling.optim.newton_schulz.views import matrices
from scaling.optim.options import MatrixOptions
from scaling.optim.registry import assign, options_of
from scaling.spec import ModelConfig, OptimizerSpec, RunSpec


def run_optimizer_flops(spec: RunSpec, tokens: int | None = None) -> int:
    """FLOPs of all optimizer steps of a run, or of those that `tokens` took."""
    steps = spec.steps if tokens is None else tokens // spec.batch_tokens
    return steps * update_flops(spec.optimizer, block_matrices(spec.model))


def update_flops(spec: OptimizerSpec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """FLOPs of one optimizer step, given its parameters by name; those that AdamW takes may be missing.

    What torch's FlopCounterMode counts when every product is a plain one.
    """
    options = options_of(spec)
    if not isinstance(options, MatrixOptions):
        return 0
    total = 0
    for assignment in assign(spec, shapes):
        if assignment.algorithm != "adamw":
            count, rows, columns = matrices(assignment.name, assignment.shape, assignment.view)
            total += count * newton_schulz_flops(rows, columns, options.ns_steps, options.form)
    return total


def block_matrices(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices in all blocks, experts as one stack a layer, by the names of `scaling.models.registry`."""
    found: dict[str, tuple[int, ...]] = {}
    mixture, width = shape.moe, shape.width
    for layer in range(shape.layers):
        found |= {f"blocks.{layer}.attention.{name}.weight": size for name, size in _attention(shape).items()}
        place = f"blocks.{layer}.feed_forward."
        if mixture is None or layer < mixture.dense_layers:
            found |= {f"{place}{name}.weight": size for name, size in _gated(width, shape.ffn_width).items()}
            continue
        found[f"{place}router.weight"] = (mixture.experts, width)
        expert = _gated(width, shape.expert_width)
        found |= {f"{place}experts.{name}": (mixture.experts, *size) for name, size in expert.items()}
        if mixture.shared:
            shared = _gated(width, mixture.shared * shape.expert_width)
            found |= {f"{place}shared.{name}.weight": size for name, size in shared.items()}
    return found


def _gated(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}


def _attention(shape: ModelConfig) -> dict[str, tuple[int, int]]:
    width, latent = shape.width, shape.mla
    if latent is None:
        return dict.fromkeys(("query", "key", "value", "output"), (width, width))
    base = width if latent.q_lora_rank is None else latent.q_lora_rank
    return {
        **({} if latent.q_lora_rank is None else {"query_latent": (latent.q_lora_rank, width)}),
        "query": (shape.heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim), base),
        "latent": (latent.kv_lora_rank, width),
        "position": (latent.qk_rope_head_dim, width),
        "key": (shape.heads * latent.qk_nope_head_dim, latent.kv_lora_rank),
        "value": (shape.heads * latent.v_head_dim, latent.kv_lora_rank),
        "output": (width, shape.heads * latent.v_head_dim),
    }
