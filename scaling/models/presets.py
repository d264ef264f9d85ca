"""Shapes of published models, by the name they are known by. No torch."""

from __future__ import annotations

from scaling.model_config import MLAConfig, ModelConfig, MoEConfig

PUBLISHED: dict[str, ModelConfig] = {
    # 15.29B weights without embedding and head, 2.24B of them activated (arXiv:2502.16982, Section 3.3); widths and
    # ranks from the configuration file that was published with the weights.
    "moonlight-16b-a3b": ModelConfig(
        layers=27,
        width=2048,
        heads=16,
        vocabulary=163_840,
        context=8_192,
        ffn=11_264,
        family="moonlight-moe",
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            dense_layers=1,
            granularity=8,
            routed_scaling_factor=2.446,
            sequence_loss=1e-3,
        ),
        mla=MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    ),
}
