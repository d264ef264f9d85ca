"""Shapes of published models, by the name they are known by. No torch."""

from __future__ import annotations

from scaling.spec import LatentAttention, Mixture, ModelShape

PUBLISHED: dict[str, ModelShape] = {
    # 15.29B weights without embedding and head, 2.24B of them activated (arXiv:2502.16982, Section 3.3); widths and
    # ranks from the configuration file that was published with the weights.
    "moonlight-16b-a3b": ModelShape(
        layers=27,
        width=2048,
        heads=16,
        vocabulary=163_840,
        context=8_192,
        ffn=11_264,
        family="moonlight-moe",
        mixture=Mixture(
            experts=64, active=6, shared=2, dense_layers=1, granularity=8, gate_scale=2.446, sequence_loss=1e-3
        ),
        latent=LatentAttention(kv_rank=512, plain=128, rotary=64, value=128),
    ),
}
