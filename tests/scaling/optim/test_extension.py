"""An optimizer from outside the package is one row: planned, counted, trained, stopped, continued, distributed."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.models.decoder import Decoder
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.optim.registry import OPTIMIZERS, Algorithm, GroupRule, assign, build, complete
from scaling.run.directory import RunDirectory
from scaling.spec import OptimizerSpec
from scaling.training.loop import train
from tests.running import at_step, finish, numbers, place
from tests.scaling.optim.lion import ROW, Lion
from tests.scaling.optim.processes import run
from tests.scaling.optim.test_distributed import Run
from tests.tiny import TINY, make_spec


@pytest.fixture(autouse=True)
def lion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lion", ROW)


def spec(**options: float) -> OptimizerSpec:
    return OptimizerSpec(name="lion", peak_lr=1e-2, options=options)


def test_its_rules_options_and_flops_come_from_the_row() -> None:
    shapes = {"embedding.weight": (256, 16), "norm.weight": (16,), "any.name": (2, 3, 4)}
    assert [a.algorithm.name for a in assign(spec(), shapes)] == ["lion"] * 3
    assert complete(spec()).options == {"beta1": 0.9, "beta2": 0.99}
    assert run_optimizer_flops(make_spec(optimizer="lion")) == 0
    with pytest.raises(UserError, match='did you mean "beta2"'):
        complete(spec(beta3=0.5))


def test_a_step_is_the_papers_formula() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = build(spec(), [("norm.weight", weight)])
    expected, momentum = weight.detach().double(), torch.zeros(3).double()
    for gradient in (torch.tensor([1.0, -1.0, 0.5]), torch.tensor([-0.02, 0.5, -3.0])):
        weight.grad = gradient
        optimizer.step()
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        expected = expected - 1e-2 * (update + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)


def test_a_run_learns_and_a_stopped_one_continues_bit_for_bit(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_spec = make_spec(optimizer="lion", manifest=manifest_hash(read_manifest(tiny_shards)))
    whole = place(run_spec, tmp_path / "whole", tiny_shards)
    record, rows = finish(whole), RunDirectory(whole).metrics()
    assert record.status == "finished"
    assert rows[-1].train_loss < rows[0].train_loss
    stopped = place(run_spec, tmp_path / "stopped", tiny_shards, every=1e9)
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(stopped, progress=False) is None
    finish(stopped)
    assert numbers(stopped) == numbers(whole)


def weights_after(way: str, steps: int) -> list[Tensor]:
    OPTIMIZERS["lion"] = ROW  # in a process of its own
    return Run(way, spec()).train(range(steps)).weights()


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_the_weights_of_one(way: str) -> None:
    alone = weights_after("alone", 2)
    for weights in run(2, weights_after, way, 2):
        assert all(torch.equal(a, b) for a, b in zip(weights, alone, strict=True))


def test_a_row_that_misstates_its_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Algorithm(name="lion", update=Lion, is_matrix=True)
    rules = lambda options: (GroupRule(pattern=".*", algorithm=wrong),)  # noqa: E731
    row = type(ROW)(label="Lion", options=ROW.options, rules=rules, groups=ROW.groups)
    monkeypatch.setitem(OPTIMIZERS, "lion", row)
    with pytest.raises(UserError, match=r"states is_matrix = True, and its update is a Lion"):
        build(spec(), [("blocks.0.attention.query.weight", nn.Parameter(torch.zeros(4, 4)))])


def test_the_model_needs_no_change() -> None:
    model = Decoder(TINY)
    assert len(build(spec(), model.named_parameters()).param_groups) == 1
