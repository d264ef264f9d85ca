import msgspec
import torch

from scaling.model_config import MLAConfig, ModelConfig
from scaling.models.decoder import Attention, Decoder, Rotary
from scaling.models.mla import MultiHeadLatentAttention
from scaling.training.qk_clip import clip_attention_, largest_logits, observed_logits

SHAPE = ModelConfig(layers=1, width=32, heads=4, vocabulary=8, context=16, ffn_multiple=8)


def logits_of(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    rotary = Rotary(SHAPE.head_size, SHAPE.context)
    query, key = (
        rotary(projection(x).view(*x.shape[:2], 4, -1).transpose(1, 2))
        for projection in (attention.query, attention.key)
    )
    return largest_logits(query, key)


def test_the_largest_logit_is_found_below_the_diagonal_only():
    query = torch.zeros(1, 1, 3, 4)
    key = torch.zeros(1, 1, 3, 4)
    query[0, 0, 0, 0], key[0, 0, 2, 0] = 10.0, 10.0  # a token cannot look ahead
    assert largest_logits(query, key) == 0
    query[0, 0, 2, 1], key[0, 0, 1, 1] = 4.0, 3.0
    assert largest_logits(query, key) == 4.0 * 3.0 / 2


def test_heads_above_the_bound_are_scaled_down_to_it():
    torch.manual_seed(0)
    attention = Attention(SHAPE)
    torch.nn.init.normal_(attention.query.weight)
    torch.nn.init.normal_(attention.key.weight)
    x = torch.randn(2, 16, 32)
    before = logits_of(attention, x)
    bound = float(before.sort().values[1:3].mean())
    assert clip_attention_(torch.nn.ModuleDict({"it": attention}), {"it": before}, bound=bound) == 2
    torch.testing.assert_close(logits_of(attention, x), before.clamp(max=bound), rtol=1e-4, atol=0)


def test_latent_attention_is_clipped_without_its_shared_key():
    latent = MLAConfig(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, q_lora_rank=12)
    shape = msgspec.structs.replace(SHAPE, mla=latent)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"it": MultiHeadLatentAttention(shape, latent)})
    attention, rotary = model["it"], Rotary(latent.qk_rope_head_dim, SHAPE.context)
    x = torch.randn(2, 16, 32)
    with observed_logits(model) as before:
        attention(x, rotary)
    shared, bound = attention.position.weight.clone(), float(before["it"].median()) + 1e-4
    assert clip_attention_(model, before, bound=bound) == 2
    with observed_logits(model) as after:
        attention(x, rotary)
    torch.testing.assert_close(after["it"], before["it"].clamp(max=bound), rtol=1e-4, atol=0)
    assert torch.equal(attention.position.weight, shared)


def test_a_model_is_watched_clipped_and_left_without_hooks():
    model = Decoder(SHAPE)
    model.initialise(0)
    with torch.no_grad():
        model.blocks[0].attention.query.weight.mul_(100)
    sequences = torch.randint(8, (2, 17), generator=torch.Generator().manual_seed(0))
    with observed_logits(model) as before:
        model.loss(sequences)
    bound = float(before["blocks.0.attention"].median()) + 1e-3
    assert clip_attention_(model, before, bound=bound) == 2
    with observed_logits(model) as after:
        model.loss(sequences)
    torch.testing.assert_close(
        after["blocks.0.attention"], before["blocks.0.attention"].clamp(max=bound), rtol=1e-4, atol=0
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
