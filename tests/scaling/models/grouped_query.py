"""A model family as another package would add it: grouped-query attention and a feed-forward of ReLU^2 without a gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.io import Positive, Strict, typed_options
from scaling.model_config import ModelConfig
from scaling.models.decoder import Decoder, Rotary
from scaling.models.registry import ModelFamily
from scaling.models.weights import Weights, decoder_weights


class GroupedQueryOptions(Strict, frozen=True):
    num_kv_heads: Positive = 1


def num_kv_heads(shape: ModelConfig) -> int:
    found = typed_options(shape.family_options or {}, GroupedQueryOptions, owner="grouped-query").num_kv_heads
    if shape.heads % found:
        raise UserError(f"num_kv_heads {found} does not divide the {shape.heads} heads.")
    return found


class GroupedQueryAttention(nn.Module):
    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups = shape.heads, num_kv_heads(shape)
        narrow = self.groups * shape.head_size
        self.query, self.output = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(shape.width, narrow, bias=False) for _ in range(2))

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        def by_head(projected: Tensor, heads: int) -> Tensor:
            split = projected.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, T, S)
            return split.repeat_interleave(self.heads // heads, dim=1)

        query = rotary(by_head(self.query(x), self.heads))
        key = rotary(by_head(self.key(x), self.groups))
        mixed = F.scaled_dot_product_attention(query, key, by_head(self.value(x), self.groups), is_causal=True)
        projected: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return projected


class SquaredReLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down(torch.relu(self.up(x)).square())
        return projected


class GroupedQueryDecoder(Decoder):
    def make_attention(self, shape: ModelConfig) -> nn.Module:
        return GroupedQueryAttention(shape)

    def make_feed_forward(self, shape: ModelConfig, layer: int) -> nn.Module:
        return SquaredReLU(shape.width, shape.ffn_width)


def weights(shape: ModelConfig) -> Weights:
    narrow = (num_kv_heads(shape) * shape.head_size, shape.width)
    dense = {name: size for name, size in decoder_weights(shape).items() if ".gate." not in name}
    return {name: narrow if name.endswith(("key.weight", "value.weight")) else size for name, size in dense.items()}


ROW = ModelFamily(build=GroupedQueryDecoder, weights=weights, options=GroupedQueryOptions)
