"""The analytic counts are what torch counts: on the meta device, where its counter sees every matrix product."""

import msgspec
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaling.errors import UserError
from scaling.flops import CONVENTIONS, count_parameters, depth_line, train_flops, train_flops_per_token
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig
from scaling.models.registry import build_model

MOONLIGHT_16B = ModelConfig(
    layers=27, width=2048, heads=16, vocabulary=163_840, context=8_192, ffn=11_264, family="moonlight-moe",
    moe=MoEConfig(
        num_experts=64, top_k=6, num_shared_experts=2, dense_layers=1, granularity=8, routed_scaling_factor=2.446,
        sequence_loss=1e-3,
    ),
    mla=MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)  # fmt: skip
"""arXiv:2502.16982, Section 3.3; widths and ranks from the configuration file published with the weights."""

MIXTURE = MoEConfig(num_experts=8, top_k=2, num_shared_experts=1, dense_layers=1, granularity=2)
LATENT = MLAConfig(kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20)

SHAPES = {
    "tiny": ModelConfig(layers=2, width=32, heads=2, vocabulary=256, context=64, ffn_multiple=8),
    "tied": ModelConfig(layers=3, width=48, heads=4, vocabulary=100, context=16, ffn_multiple=16, tied=True),
    **{
        f"moonlight-{layers}-layers": ModelConfig(
            layers=layers, width=128 * layers, heads=layers, vocabulary=50_304, context=8192
        )
        for layers in (12, 14, 16, 18, 20)
    },
    "moonlight-16b-a3b": MOONLIGHT_16B,
    "experts": ModelConfig(
        layers=2, width=32, heads=2, vocabulary=256, context=64, ffn=64, family="mixtral-moe",
        moe=MoEConfig(num_experts=4, top_k=3, score="topk-softmax"),
    ),
    "moonlight-moe": ModelConfig(
        layers=3, width=32, heads=4, vocabulary=256, context=64, ffn_multiple=16, family="moonlight-moe",
        moe=MIXTURE, mla=LATENT,
    ),
    "query-rank": ModelConfig(
        layers=2, width=32, heads=4, vocabulary=64, context=32, ffn_multiple=16, tied=True, family="moonlight-moe",
        moe=MIXTURE, mla=MLAConfig(kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20, q_lora_rank=16),
    ),
}  # fmt: skip


def grouped_flops(rows: tuple[int, ...], stack: tuple[int, ...], *_: object, **__: object) -> int:
    """FLOPs of a grouped product, which torch's counter does not know: each row is multiplied by one matrix."""
    return 2 * rows[0] * rows[1] * stack[-1]


def counted_flops(shape: ModelConfig, sequences: int = 2) -> int:
    """FLOPs that FlopCounterMode counts in one forward and backward pass."""
    with torch.device("meta"):
        model = build_model(shape)
        tokens = torch.zeros(sequences, shape.context + 1, dtype=torch.int64)
    # The fused kernels' rule charges a recomputed forward pass; the plain one is the mathematics.
    grouped = {torch.ops.aten._grouped_mm: grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_full_attention_convention_is_what_torch_counts(shape: ModelConfig) -> None:
    assert counted_flops(shape) == train_flops(shape, 2 * shape.context, "attention-full")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_conventions_differ_by_exactly_the_part_they_name(shape: ModelConfig) -> None:
    parameters = count_parameters(shape)
    per_token = {name: train_flops_per_token(shape, name) for name in CONVENTIONS}
    assert per_token["matmul"] - per_token["6nd"] == 6 * parameters.head
    full = per_token["attention-full"] - per_token["matmul"]
    assert full == 2 * (per_token["attention"] - per_token["matmul"])
    if shape.mla is None:
        assert full == 12 * shape.layers * shape.width * shape.context


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_parameters_by_part_are_the_models(shape: ModelConfig) -> None:
    with torch.device("meta"):
        model = build_model(shape)
    parameters = count_parameters(shape)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameters.total == sum(sizes.values())
    assert parameters.embedding == sizes["embedding.weight"]
    assert parameters.norms == sum(size for name, size in sizes.items() if "norm" in name)
    assert parameters.blocks == sum(size for name, size in sizes.items() if "blocks" in name and "norm" not in name)


@pytest.mark.parametrize(("layers", "millions"), [(12, 339.7), (14, 545.9), (16, 822.1), (18, 1146.6), (20, 1586.0)])
def test_moonlights_sizes_follow_from_depth_alone(layers: int, millions: float) -> None:
    shape = ModelConfig(layers=layers, width=128 * layers, heads=layers, vocabulary=1, context=8192)
    assert round(count_parameters(shape).blocks / 1e6, 1) == millions


def test_unknown_convention_is_refused_with_the_near_name() -> None:
    with pytest.raises(UserError, match='did you mean "matmul"'):
        train_flops_per_token(SHAPES["tiny"], "matmull")


def test_the_published_mixture_counts_what_its_paper_says() -> None:
    shape = MOONLIGHT_16B
    with torch.device("meta"):
        model = build_model(shape)
    parameters = count_parameters(shape)
    assert parameters.total == sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters.blocks / 1e9:.2f}" == "15.29"
    assert f"{parameters.activated / 1e9:.2f}" == "2.24"
    # And with embedding and head it is the 16B of its name.
    assert round(parameters.total / 1e9) == 16


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_blocks_are_a_line_in_depth(shape: ModelConfig) -> None:
    for layers in (shape.layers, shape.layers + 3):
        deeper = msgspec.structs.replace(shape, layers=layers)
        assert depth_line(shape).blocks(layers) == count_parameters(deeper).blocks
