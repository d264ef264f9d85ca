import pytest
import torch
from torch import nn

from scaling.model_config import ModelConfig
from scaling.models.decoder import Decoder
from scaling.optim.diagnostics import parameter_class, svd_entropy, update_rms, weights_of
from scaling.optim.registry import build
from scaling.spec import OptimizerSpec

SHAPE = ModelConfig(layers=2, width=64, heads=2, vocabulary=64, context=32, ffn_multiple=8)


def one_step(optimizer: OptimizerSpec) -> dict[str, float]:
    model = Decoder(SHAPE)
    model.initialise(0)
    built = build(optimizer, model.named_parameters())
    model.loss(torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))).backward()
    before = weights_of(built)
    built.step()
    return update_rms(built, before)


def test_layers_share_a_class():
    assert parameter_class("blocks.11.attention.query.weight") == "attention.query"
    assert parameter_class("blocks.0.feed_forward.experts.up") == "feed_forward.experts.up"
    assert parameter_class("embedding.weight") == "embedding"


def test_adamws_first_step_has_size_one_without_decay():
    sizes = one_step(OptimizerSpec(name="adamw", peak_lr=1e-2, weight_decay=0.5))
    # Both moments are the gradient itself; entries near epsilon fall short. Rare tokens have no gradient at all.
    assert {name: size for name, size in sizes.items() if name != "embedding"} == {
        name: pytest.approx(1.0, abs=0.01) for name in sizes if name != "embedding"
    }


def test_exact_mode_reaches_the_nominal_size():
    nominal = one_step(OptimizerSpec(name="muon", peak_lr=1e-2))
    exact = one_step(OptimizerSpec(name="muon", peak_lr=1e-2, options={"update_rms": "exact"}))
    matrices = [name for name in nominal if name.startswith(("attention.", "feed_forward."))]
    assert len(matrices) == 7
    for name in matrices:
        assert 0.08 < nominal[name] < 0.2
        assert exact[name] == pytest.approx(0.2, rel=1e-3)


def test_a_frozen_group_is_left_out():
    optimizer = build(OptimizerSpec(name="adamw", peak_lr=1.0), [("norm.weight", nn.Parameter(torch.ones(4)))])
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights_of(optimizer)
    optimizer.step()
    assert update_rms(optimizer, before) == {}


def test_entropy_of_known_spectra():
    def built(weight):
        name = "blocks.0.attention.query.weight" if weight.ndim == 2 else "blocks.0.feed_forward.experts.up"
        return build(OptimizerSpec(name="adamw", peak_lr=1.0), [(name, nn.Parameter(weight))])

    turned = torch.linalg.qr(torch.randn(8, 8))[0]
    assert svd_entropy(built(turned)) == {"attention.query": pytest.approx(1.0, abs=1e-5)}
    # Two equal values among eight: log 2 / log 8. A stack of experts is the mean of its matrices.
    pair = turned @ torch.diag(torch.tensor([3.0, 3.0, 0, 0, 0, 0, 0, 0]))
    assert svd_entropy(built(torch.stack([pair, turned]))) == {
        "feed_forward.experts.up": pytest.approx((1 / 3 + 1) / 2, abs=1e-4)
    }
