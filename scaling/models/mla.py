"""Multi-head latent attention: keys and values from a narrow latent, position in channels of its own.

Source: DeepSeek-V2 (arXiv:2405.04434, Section 2.1). Every matrix is a parameter of its own, also those that the published
checkpoints store as one (latent and position, key and value), because Muon orthogonalises a matrix as a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.model_config import MLAConfig, ModelConfig
from scaling.models.decoder import Rotary

LATENT_NORM_EPSILON = 1e-6
"""Epsilon of the norms inside attention; the published model has 1e-5 in its blocks, as here."""


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention. Letters: B sequences, T tokens, H width, A heads."""

    def __init__(self, shape: ModelConfig, latent: MLAConfig) -> None:
        super().__init__()
        self.heads, self.sizes = shape.heads, latent
        queries = shape.heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        if latent.q_lora_rank is None:
            self.query = nn.Linear(shape.width, queries, bias=False)
        else:
            self.query_latent = nn.Linear(shape.width, latent.q_lora_rank, bias=False)
            self.query_norm = nn.RMSNorm(latent.q_lora_rank, eps=LATENT_NORM_EPSILON)
            self.query = nn.Linear(latent.q_lora_rank, queries, bias=False)
        self.latent = nn.Linear(shape.width, latent.kv_lora_rank, bias=False)
        self.latent_norm = nn.RMSNorm(latent.kv_lora_rank, eps=LATENT_NORM_EPSILON)
        self.position = nn.Linear(shape.width, latent.qk_rope_head_dim, bias=False)
        self.key = nn.Linear(latent.kv_lora_rank, shape.heads * latent.qk_nope_head_dim, bias=False)
        self.value = nn.Linear(latent.kv_lora_rank, shape.heads * latent.v_head_dim, bias=False)
        self.output = nn.Linear(shape.heads * latent.v_head_dim, shape.width, bias=False)

    def query_and_key(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Queries and keys whose products are the scores, ``(B, A, T, qk_nope_head_dim + qk_rope_head_dim)`` each."""
        return self._query(x, rotary), self._key(self.latent_norm(self.latent(x)), x, rotary)

    def _query(self, x: Tensor, rotary: Rotary) -> Tensor:
        base = x if self.sizes.q_lora_rank is None else self.query_norm(self.query_latent(x))
        nope, rope = torch.split(
            self._by_head(self.query(base)), [self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim], dim=-1
        )
        return torch.cat([nope, rotary(rope)], dim=-1)

    def _key(self, latent: Tensor, x: Tensor, rotary: Rotary) -> Tensor:
        # One rotary part for all heads, (B, 1, T, qk_rope_head_dim).
        position = rotary(self.position(x).unsqueeze(1)).expand(-1, self.heads, -1, -1)
        return torch.cat([self._by_head(self.key(latent)), position], dim=-1)

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.heads, -1).transpose(1, 2)  # (B, A, T, channels)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """``(B, T, H)`` to ``(B, T, H)``."""
        query, latent = self._query(x, rotary), self.latent_norm(self.latent(x))
        key = self._key(latent, x, rotary)
        mixed = F.scaled_dot_product_attention(query, key, self._by_head(self.value(latent)), is_causal=True)
        projected: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return projected
