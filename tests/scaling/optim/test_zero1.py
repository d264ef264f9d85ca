import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling.optim.distributed.zero1 import Zero1Muon
from scaling.optim.registry import OPTIMIZERS, build, complete
from scaling.spec import OptimizerSpec
from tests.scaling.optim.processes import run

SPEC = complete(OptimizerSpec(name="muon", peak_lr=0.05, options={"ns_dtype": "bf16"}))
SHAPES = [(32, 32), (32, 32), (80, 32), (80, 32), (32, 80), (24, 40)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def alone() -> list[Tensor]:
    weights = matrices()
    optimizer = build(SPEC, [(f"blocks.{i}.feed_forward.up.weight", weight) for i, weight in enumerate(weights)])
    for step in range(3):
        give_gradients(weights, step)
        optimizer.step()
    return [weight.detach() for weight in weights]


def algorithm_one() -> tuple[list[Tensor], int]:
    weights = matrices()
    optimizer = _optimizer(weights)
    for step in range(3):
        give_gradients(weights, step)
        optimizer.step(SPEC.peak_lr)
    held = [value for value in vars(optimizer).values() if isinstance(value, Tensor) and value is not optimizer.flat]
    return [weight.detach() for weight in weights], sum(tensor.numel() for tensor in held)


def _optimizer(weights: list[nn.Parameter]) -> Zero1Muon:
    hyper = OPTIMIZERS["muon"].groups(SPEC, OPTIMIZERS["muon"].options(**SPEC.options))["muon"]
    return Zero1Muon(weights, hyper)


@pytest.mark.parametrize("world", [2, 4])
def test_algorithm_one_trains_the_weights_of_one_process_with_one_buffer_of_state(world):
    entries = sum(weight.numel() for weight in matrices())
    for weights, state in run(world, algorithm_one):
        assert all(torch.equal(a, b) for a, b in zip(weights, alone(), strict=True))
        assert state == -(-entries // world)  # AdamW keeps two


def traffic() -> dict[str, float]:
    """Bytes that leave this process in a step, by collective; a ring's share for the two over the flat buffer."""
    world, sent = dist.get_world_size(), {"reduce": 0.0, "gather": 0.0, "weights": 0.0}

    def counted(call: Any, kind: str, tensor_at: int) -> Any:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            tensor = arguments[tensor_at]
            size = tensor.numel() * tensor.element_size()
            sent[kind] += size * (world - 1) / world if kind == "reduce" else size * (world - 1)
            return call(*arguments, **keywords)

        return wrapper

    weights = matrices()
    optimizer = _optimizer(weights)
    give_gradients(weights, 0)
    dist.reduce_scatter_tensor = counted(dist.reduce_scatter_tensor, "reduce", 1)
    dist.all_gather_into_tensor = counted(dist.all_gather_into_tensor, "weights", 1)
    batch = dist.batch_isend_irecv

    def counted_batch(transfers: list[Any]) -> Any:
        sent["gather"] += sum(t.tensor.numel() * t.tensor.element_size() for t in transfers if t.op is dist.isend)
        return batch(transfers)

    dist.batch_isend_irecv = counted_batch
    optimizer.step(SPEC.peak_lr)
    return sent


@pytest.mark.parametrize("world", [2, 4])
def test_its_traffic_is_one_to_one_and_a_quarter_of_adamws(world):
    sent = run(world, traffic)
    total = {kind: sum(each[kind] for each in sent) for kind in ("reduce", "gather", "weights")}
    # ZeRO-1 AdamW reduces the gradients and gathers the weights, four bytes an entry each.
    assert total["reduce"] == total["weights"]
    adamw = total["reduce"] + total["weights"]
    assert 1 < (adamw + total["gather"]) / adamw <= 1.25
