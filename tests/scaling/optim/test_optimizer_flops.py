"""The optimizer's FLOPs equal torch's count of a real step for every kind of model, and need no torch."""

import subprocess
import sys

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scaling.flops import train_flops
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig
from scaling.models.registry import build_model
from scaling.models.weights import decoder_weights
from scaling.optim.optimizer_flops import run_optimizer_flops, update_flops
from scaling.optim.registry import OPTIMIZERS, build
from scaling.spec import OptimizerSpec
from tests.tiny import make_spec

DENSE = ModelConfig(layers=2, width=32, heads=2, vocabulary=64, context=16, ffn_multiple=8)
SHAPES = {
    "dense": DENSE,
    "tied": msgspec.structs.replace(DENSE, tied=True),
    "experts": msgspec.structs.replace(
        DENSE, family="mixtral-moe", moe=MoEConfig(num_experts=4, top_k=2, score="topk-softmax")
    ),
    "latent attention": msgspec.structs.replace(
        DENSE, family="moonlight-moe", mla=MLAConfig(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10),
        moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=2, dense_layers=1, granularity=2),
    ),
    "query rank": msgspec.structs.replace(
        DENSE, family="moonlight-moe", mla=MLAConfig(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, q_lora_rank=20),
        moe=MoEConfig(num_experts=4, top_k=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OPTIMIZERS), ("muon", {"head_blocks": 2}), ("muon", {"form": "gram", "ns_steps": 7})],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_steps_flops_are_what_torch_counts(name: str, options: dict[str, int | str], shape: ModelConfig) -> None:
    spec = OptimizerSpec(name=name, peak_lr=1e-3, options=options)
    model = build_model(shape)
    optimizer = build(spec, model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == update_flops(spec, decoder_weights(shape))


def test_flops_of_a_run_and_muons_share_at_moonlights_size() -> None:
    spec = make_spec(optimizer="muon", steps=12, windows=8)
    one = update_flops(spec.optimizer, decoder_weights(spec.model))
    assert run_optimizer_flops(spec) == 12 * one > 0
    assert run_optimizer_flops(spec, tokens=5 * spec.batch_tokens + 1) == 5 * one
    assert run_optimizer_flops(make_spec(optimizer="adamw")) == 0
    # 192 sequences of 8192 tokens at Moonlight's 1.15B: Newton-Schulz adds 0.63 to 0.64 % to 6ND.
    large = ModelConfig(layers=18, width=2304, heads=18, vocabulary=1024, context=8192)
    charged = update_flops(OptimizerSpec(name="muon", peak_lr=1e-3), decoder_weights(large))
    assert charged / train_flops(large, 192 * 8192) == pytest.approx(0.0064, abs=2e-4)


def test_counting_loads_no_torch() -> None:
    code = "import sys, scaling.optim.optimizer_flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
