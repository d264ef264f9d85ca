"""Experts: every road gives the same numbers, load evens out, and a stopped run is the run that nothing stopped."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import msgspec
import pytest
import torch
from running import at_step, finish, numbers, place
from safetensors.torch import load_file
from tiny import TINY_MOONLIGHT, make_spec

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.model_config import ModelConfig, MoEConfig
from scaling.models.moe import (
    MoEDecoder,
    MoEFeedForward,
    grouped_product,
    has_grouped,
    loop_product,
    routed_scaling_factor,
    sequence_loss,
)
from scaling.models.registry import build_model
from scaling.optim.registry import assign, complete
from scaling.run.directory import RunDirectory
from scaling.spec import OptimizerSpec
from scaling.training.loop import train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_the_loop_with_idle_experts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 11, 1, 0])
    outcomes = []
    for product in (grouped_product, loop_product):
        torch.manual_seed(1)
        rows = torch.randn(17, 16, dtype=dtype, requires_grad=True)
        stack = torch.randn(5, 24, 16, dtype=dtype, requires_grad=True)
        assert has_grouped(rows, stack)
        product(rows, stack, counts).square().mean().backward()
        outcomes.append((product(rows, stack, counts), rows.grad, stack.grad))
    for grouped, looped in zip(*outcomes, strict=True):
        assert grouped is not None
        assert looped is not None
        assert torch.equal(grouped, looped)


def naive(layer: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """One token after another, one expert after another, from the paper's equations."""
    mixture, experts = layer.mixture, layer.experts
    out = torch.zeros_like(x)
    for sequence in range(x.shape[0]):
        for position in range(x.shape[1]):
            token = x[sequence, position]
            logits = layer.router.weight @ token
            scores = {
                "sigmoid": lambda logits: 1 / (1 + torch.exp(-logits)),
                "topk-softmax": torch.exp,
                "softmax-topk": lambda logits: torch.exp(logits) / torch.exp(logits).sum(),
            }[mixture.score](logits)
            order = (scores + layer.router.bias).detach().argsort(descending=True).tolist()
            chosen = order[: mixture.top_k]
            total = 1.0 if mixture.score == "softmax-topk" else sum(scores[e] for e in chosen)
            for e in chosen:
                gate, up = experts.gate[e] @ token, experts.up[e] @ token
                output = experts.down[e] @ (gate / (1 + torch.exp(-gate)) * up)
                out[sequence, position] += layer.router.scale * scores[e] / total * output
            if mixture.num_shared_experts:
                out[sequence, position] += layer.shared(token)
    return out


@pytest.mark.parametrize("score", ["sigmoid", "topk-softmax", "softmax-topk"])
def test_a_layer_is_the_naive_sum_over_tokens_and_experts(score: str) -> None:
    mixture = MoEConfig(num_experts=6, top_k=3, num_shared_experts=1, score=score)  # type: ignore[arg-type]
    shape = ModelConfig(layers=1, width=12, heads=2, vocabulary=8, context=8, ffn=20, family="mixtral-moe", moe=mixture)
    torch.manual_seed(0)
    layer = MoEFeedForward(shape, mixture)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if score == "sigmoid":
        layer.router.bias.copy_(torch.randn(6) * 0.2)
    x = torch.randn(2, 8, 12)
    probe = torch.randn(2, 8, 12)
    (layer(x) * probe).sum().backward()
    ours = layer(x).detach(), [parameter.grad for parameter in layer.parameters()]

    reference = MoEFeedForward(shape, mixture).double()
    reference.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    expected = naive(reference, x.double())
    (expected * probe.double()).sum().backward()
    torch.testing.assert_close(ours[0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for mine, parameter in zip(ours[1], reference.parameters(), strict=True):
        assert mine is not None
        assert parameter.grad is not None
        torch.testing.assert_close(mine.double(), parameter.grad, rtol=1e-4, atol=1e-5)


def imbalance_after(rate: float, steps: int = 60) -> float:
    """Mean load of the busiest expert over the mean, in the last third of a short run on a module of Python's own."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    shape = ModelConfig(
        layers=2, width=16, heads=2, vocabulary=256, context=32, ffn=16, family="mixtral-moe",
        moe=MoEConfig(num_experts=8, top_k=2, bias_update_rate=rate),
    )  # fmt: skip
    model = build_model(shape)
    model.initialise(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sequences = torch.Generator().manual_seed(0)
    seen = []
    for step in range(steps):
        starts = torch.randint(0, len(text) - 33, (16,), generator=sequences)
        model.loss(torch.stack([text[start : start + 33] for start in starts])).backward()
        model.end_of_step(lambda load: load)
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps * 2 // 3:
            seen.append(model.load_imbalance() or 0.0)
    return sum(seen) / len(seen)


def test_the_bias_rule_evens_out_the_load_of_real_text() -> None:
    left_alone, ruled = imbalance_after(0.0), imbalance_after(0.02)
    assert left_alone > 1.8
    assert ruled - 1 < 0.6 * (left_alone - 1)


def test_the_bias_moves_by_sign_and_keeps_its_mean() -> None:
    model = build_model(TINY_MOONLIGHT)
    assert isinstance(model, MoEDecoder)
    (layer,) = model.mixtures()
    layer.router.update_bias(torch.tensor([4, 4, 4, 4, 4, 4, 3, 5]))  # six at the mean, one below, one above
    torch.testing.assert_close(layer.router.bias, torch.tensor([0.0] * 6 + [0.02, -0.02]))
    layer.router.update_bias(torch.tensor([8, 4, 4, 4, 4, 4, 2, 2]))
    torch.testing.assert_close(
        layer.router.bias,
        torch.tensor([0.0] * 6 + [0.02, -0.02]) + 0.02 * torch.tensor([-1.125] + [-0.125] * 5 + [0.875] * 2),
    )


def test_an_evaluation_is_no_load() -> None:
    model = build_model(TINY_MOONLIGHT)
    model.initialise(0)
    sequences = torch.randint(0, 256, (4, 17))
    with torch.no_grad():
        model.loss(sequences)
    assert isinstance(model, MoEDecoder)
    (layer,) = model.mixtures()
    assert int(layer.router.load.sum()) == 0
    model.loss(sequences)
    assert int(layer.router.load.sum()) == 4 * 16 * TINY_MOONLIGHT.moe.top_k


def test_sequence_loss_of_even_and_of_extreme_load() -> None:
    assert float(sequence_loss(torch.full((4, 8), 0.5), 2, 1)) == pytest.approx(1.0)
    alone = torch.zeros(4, 8).index_fill_(1, torch.tensor([3]), 1.0)
    assert float(sequence_loss(alone, 1, 1)) == pytest.approx(8.0)


def test_sequence_loss_ignores_the_selection_bias() -> None:
    shape = msgspec.structs.replace(TINY_MOONLIGHT, moe=msgspec.structs.replace(TINY_MOONLIGHT.moe, sequence_loss=1.0))
    model = build_model(shape)
    model.initialise(0)
    assert isinstance(model, MoEDecoder)
    (layer,) = model.mixtures()
    layer.router.bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    layer(x)
    expected = 0.0
    for sequence in x:
        scores = torch.sigmoid(sequence @ layer.router.weight.T)
        kth = scores.topk(2).values[:, -1:]
        f = (scores >= kth).sum(0) * 8 / (2 * 16)  # Equation 18
        p = (scores / scores.sum(1, keepdim=True)).mean(0)  # 19 and 20
        expected += float((f * p).sum().detach()) / 3
    assert layer.sequence_loss is not None
    assert float(layer.sequence_loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_gate_scale_is_the_one_of_appendix_c() -> None:
    assert routed_scaling_factor(64, 6) == pytest.approx(2.446, abs=5e-4)
    assert routed_scaling_factor(4, 1) == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_claimed_and_experts_are_matrices(optimizer: str) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build_model(TINY_MOONLIGHT).named_parameters()}
    claimed = {row.name: row for row in assign(complete(OptimizerSpec(name=optimizer, peak_lr=1e-3)), shapes)}
    assert claimed.keys() == shapes.keys()
    if optimizer == "muon":
        assert {row.view for name, row in claimed.items() if ".experts." in name} == {"experts"}
        assert claimed["blocks.1.attention.latent.weight"].algorithm.name == "muon"
        assert claimed["blocks.1.attention.latent_norm.weight"].algorithm.name == "adamw"


def test_a_stopped_mixture_ends_as_if_it_had_never_stopped(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_hash(read_manifest(tiny_shards))
    spec = make_spec(shape=TINY_MOONLIGHT, steps=12, optimizer="muon", manifest=manifest)
    whole = place(spec, tmp_path / "whole", tiny_shards, micro_batch=4)
    record = finish(whole)
    stopped = place(spec, tmp_path / "stopped", tiny_shards, every=1e9, micro_batch=4)
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(stopped, progress=False) is None
    assert finish(stopped).attempts == 2
    assert numbers(stopped) == numbers(whole)
    imbalances = [[row.load_imbalance for row in RunDirectory(path).metrics()] for path in (whole, stopped)]
    assert imbalances[0] == imbalances[1]
    assert all(value is not None and value >= 1 for value in imbalances[0])
    # What balances the load is part of the weights, for they were trained with it.
    biases = {name: value for name, value in load_file(whole / "weights.safetensors").items() if "bias" in name}
    assert biases
    assert all(bool(value.any()) for value in biases.values())
    assert record.parameters["activated"] < record.parameters["blocks"]


@pytest.mark.parametrize(
    ("family", "parts", "sentence"),
    [
        ("decoder", {"moe": TINY_MOONLIGHT.moe}, "use the family mixtral-moe or moonlight-moe"),
        (
            "moonlight-moe",
            {"moe": TINY_MOONLIGHT.moe},
            "needs a table mla. Add one, or use the family decoder or mixtral-moe",
        ),
        ("mixtral", {"moe": TINY_MOONLIGHT.moe}, 'did you mean "mixtral-moe"'),
    ],
)
def test_a_family_without_its_parts_is_refused(family: str, parts: dict[str, MoEConfig], sentence: str) -> None:
    shape = ModelConfig(layers=2, width=16, heads=2, vocabulary=8, context=8, ffn=16, family=family, **parts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        build_model(shape)


def test_impossible_mixtures_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match="Use top_k = 4 or fewer"):
        MoEConfig(num_experts=4, top_k=5)
    with pytest.raises(UserError, match="granularity 3 does not divide the 32 hidden units"):
        ModelConfig(
            layers=2,
            width=16,
            heads=2,
            vocabulary=8,
            context=8,
            ffn=32,
            moe=MoEConfig(num_experts=4, top_k=1, granularity=3),
        )
