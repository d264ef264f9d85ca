import subprocess
import sys

import msgspec
import pytest
import torch

from scaling.errors import UserError
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig
from scaling.models.decoder import Decoder
from scaling.models.registry import FAMILIES
from scaling.optim.registry import OPTIMIZERS, assign, build, complete
from scaling.spec import OptimizerSpec

SHAPE = ModelConfig(layers=2, width=32, heads=2, vocabulary=64, context=16, ffn_multiple=8)


def shapes_of(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = FAMILIES[shape.family].build(shape)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def spec(name: str, **options: float | int | bool | str) -> OptimizerSpec:
    return OptimizerSpec(name=name, peak_lr=1e-3, options=options)


def test_planning_reads_the_table_without_torch():
    code = "import sys, scaling.optim.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_completing_writes_every_default_and_twice_is_once(name):
    whole = complete(spec(name))
    fields = msgspec.structs.fields(OPTIMIZERS[name].options)
    assert set(whole.options) == {field.name for field in fields if field.default is not None}
    assert complete(whole) == whole


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (spec("muonn"), 'did you mean "muon"'),
        (spec("muon", momentumm=0.9), 'option of muon "momentumm" is not known; did you mean "momentum"'),
        (spec("muon", momentum="high"), "option momentum of muon is 'high'"),
        (spec("muon", momentum=1.0), "option momentum of muon is 1.0"),
        (spec("muon", nesterov=1), "option nesterov of muon is 1"),
        (spec("muon", coefficients="kellar"), "option coefficients of muon is 'kellar'"),
        (spec("adamw", momentum=0.9), 'option of adamw "momentum" is not known'),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        complete(wrong)


PARTS = {
    "moe": MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, dense_layers=1),
    "mla": MLAConfig(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, q_lora_rank=12),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_exactly_the_matrices_of_the_blocks(family, tied):
    parts = {part: value for part, value in PARTS.items() if part in FAMILIES[family].requires}
    shapes = shapes_of(msgspec.structs.replace(SHAPE, family=family, tied=tied, **parts))
    muon = {a.name for a in assign(spec("muon"), shapes) if a.algorithm.name == "muon"}
    assert muon == {name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) > 1}


def test_expert_stacks_and_latent_projections_are_matrices():
    shapes = {
        "blocks.1.feed_forward.experts.gate": (8, 48, 32),
        "blocks.1.feed_forward.router.weight": (8, 32),
        "blocks.1.feed_forward.shared.down.weight": (32, 48),
        "blocks.1.attention.kv_down.weight": (24, 32),
        "blocks.1.attention.kv_norm.weight": (24,),
    }
    assert [(a.algorithm.name, a.view) for a in assign(spec("muon"), shapes)] == [
        ("muon", "experts"), ("muon", "whole"), ("muon", "whole"), ("muon", "whole"), ("adamw", "whole"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("blocks.0.attn_gated.weight", (4, 4), "claimed by no rule"),
        ("xblocks.0.attention.query.weight", (4, 4), "claimed by no rule"),
        ("blocks.0.attention.query.weight.extra", (4, 4), "claimed by no rule"),
        ("blocks.0.attention.query.weight", (4,), "needs 2 dimensions"),
        ("blocks.0.feed_forward.experts.up", (4, 4), "needs 3 dimensions"),
    ],
)
def test_a_parameter_that_no_rule_was_written_for_is_refused(name, shape, sentence):
    with pytest.raises(UserError, match=sentence):
        assign(spec("muon"), {name: shape})


def test_head_blocks_must_divide_the_rows():
    with pytest.raises(UserError, match="32 rows, which 3 blocks do not divide"):
        assign(spec("muon", head_blocks=3), {"blocks.0.attention.query.weight": (32, 32)})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_group_says_its_algorithm_and_its_own_peak(name):
    model = Decoder(SHAPE)
    optimizer = build(spec(name), model.named_parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    assert all(group["peak_lr"] == group["lr"] == 1e-3 for group in optimizer.param_groups)
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_the_adamw_part_can_have_its_own_rate_and_decay():
    optimizer = build(spec("muon", adamw_lr_factor=0.5, adamw_decay_factor=0.0), Decoder(SHAPE).named_parameters())
    rates = {group["algorithm"]: (group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {"muon": (1e-3, 0.1), "adamw": (5e-4, 0.0)}
