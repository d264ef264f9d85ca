"""Moonlight's Algorithm 1: the weights of one process, one buffer of state, little traffic, checkpoints, errors."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.optim.registry import build, check_strategy, complete
from scaling.run.directory import RunDirectory
from scaling.spec import OptimizerSpec, Placement
from tests.running import finish
from tests.scaling.optim.processes import run
from tests.tiny import make_spec

SPEC = complete(OptimizerSpec(name="muon", peak_lr=0.05, options={"ns_dtype": "bf16", "head_blocks": 2}))
SHAPES = {
    "blocks.0.attention.query.weight": (32, 32),
    "blocks.0.attention.output.weight": (32, 32),
    "blocks.0.feed_forward.gate.weight": (80, 32),
    "blocks.0.feed_forward.up.weight": (80, 32),
    "blocks.0.feed_forward.down.weight": (32, 80),
    "blocks.1.feed_forward.experts.up": (3, 24, 40),
    "norm.weight": (32,),
}
MATRIX_ENTRIES = sum(torch.Size(shape).numel() for name, shape in SHAPES.items() if name != "norm.weight")


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def set_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(steps: range, state: dict[str, Any] | None = None, weights: list[Tensor] | None = None) -> Any:
    """Weights, the optimizer's state as a checkpoint stores it, and entries of momentum on this process."""
    named = parameters()
    if weights is not None:
        for (_, parameter), saved in zip(named, weights, strict=True):
            parameter.data.copy_(saved)
    optimizer = build(SPEC, named, strategy="zero1")
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))  # processes of a test share the memory of their arguments
    for step in steps:
        set_gradients(named, step)
        optimizer.step()
    entries = sum(state["momentum"].numel() for state in optimizer.state.values() if "momentum" in state)
    return [parameter.detach() for _, parameter in named], optimizer.state_dict(), entries


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_algorithm_one_trains_the_weights_of_one_process(world):
    alone, alone_state, _ = train(range(3))
    results = run(world, train, range(3))
    for weights, state, _ in results:
        assert equal(weights, alone)
        for key, stored in alone_state["state"].items():
            assert equal(list(state["state"][key].values()), list(stored.values()))
    # One buffer of state, divided: AdamW keeps two.
    assert sum(entries for _, _, entries in results) == MATRIX_ENTRIES


def test_a_checkpoint_moves_between_one_process_and_several():
    alone, _, _ = train(range(4))
    weights, state, _ = train(range(1))
    weights, state, _ = run(2, train, range(1, 2), state, weights)[0]
    weights, state, _ = run(3, train, range(2, 3), state, weights)[0]
    assert equal(train(range(3, 4), state, weights)[0], alone)


def traffic() -> dict[str, float]:
    """Bytes that this process sends in a step, by collective; a ring's share of an all-gather."""
    world, sent = dist.get_world_size(), {"pieces": 0.0, "weights": 0.0}
    named = parameters()
    optimizer = build(SPEC, named, strategy="zero1")
    set_gradients(named, 0)
    gather, batch = dist.all_gather_into_tensor, dist.batch_isend_irecv

    @functools.wraps(gather)
    def counted_gather(output: Tensor, shard: Tensor, **keywords: Any) -> Any:
        sent["weights"] += shard.numel() * shard.element_size() * (world - 1)
        return gather(output, shard, **keywords)

    def counted_batch(transfers: list[Any]) -> Any:
        sent["pieces"] += sum(t.tensor.numel() * t.tensor.element_size() for t in transfers if t.op is dist.isend)
        return batch(transfers)

    dist.all_gather_into_tensor, dist.batch_isend_irecv = counted_gather, counted_batch
    optimizer.step()
    return sent


@pytest.mark.parametrize("world", [2, 4])
def test_its_traffic_is_one_to_one_and_a_quarter_of_adamws(world):
    sent = run(world, traffic)
    # ZeRO-1 AdamW reduces the gradients and gathers the weights, four bytes an entry each.
    adamw = 2 * sum(each["weights"] for each in sent)
    pieces = sum(each["pieces"] for each in sent)
    assert 1 < (adamw + pieces) / adamw <= 1.25


def test_an_optimizer_whose_state_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match=r"NorMuon keeps state .* one of the optimizers adamw, muon"):
        check_strategy(OptimizerSpec(name="normuon", peak_lr=1.0), "zero1")
    check_strategy(OptimizerSpec(name="normuon", peak_lr=1.0), "fsdp2")


def test_a_placed_run_of_two_processes_ends_as_in_one(tiny_shards: Path, tmp_path: Path) -> None:
    spec = make_spec(steps=4, optimizer="muon", manifest=manifest_hash(read_manifest(tiny_shards)))
    losses = []
    for name, placed in (("one", {}), ("two", {"devices": 2, "strategy": "zero1", "checkpoint_seconds": 0.0})):
        directory = RunDirectory(tmp_path / name / spec.id)
        directory.create(spec, Placement(data=str(tiny_shards), device="cpu", **placed))  # type: ignore[arg-type]
        losses.append(finish(directory.path).validation_loss)
    # Gradients of two processes are added in another order: rounding in fp32.
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
