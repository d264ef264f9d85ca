import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from scaling.errors import UserError
from scaling.model_config import ModelConfig
from scaling.models.decoder import Decoder
from scaling.optim.distributed.ddp import assign_owners
from scaling.optim.newton_schulz.coefficients import newton_schulz_flops
from scaling.optim.registry import OPTIMIZERS, build
from scaling.spec import OptimizerSpec
from tests.scaling.optim.processes import run

SHAPE = ModelConfig(layers=3, width=32, heads=2, vocabulary=64, context=16, ffn_multiple=1)
"""Its feed-forward has 86 hidden units, which four processes do not divide."""


def spec(name: str = "muon", **options: Any) -> OptimizerSpec:
    return OptimizerSpec(name=name, peak_lr=1e-2, options=options)


class Run:
    """A model with its optimizer: alone, replicated (DDP) or sharded (FSDP2)."""

    def __init__(self, way: str, optimizer: OptimizerSpec) -> None:
        self.model = Decoder(SHAPE)
        self.model.initialise(0)
        self.loss = self.model.loss
        if way == "ddp":
            # DDP averages the gradients of calls through its wrapper.
            wrapped = DistributedDataParallel(_Loss(self.model))
            self.loss = lambda sequences: wrapped(sequences)
        if way == "fsdp2":
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
            self.loss = lambda sequences: _loss_of(self.model, sequences)
        self.optimizer = build(optimizer, self.model.named_parameters())

    def train(self, steps: range) -> "Run":
        """Every process sees the same sequences: the mean of equal gradients is exact, so runs can be compared bit for bit."""
        for step in steps:
            sequences = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.loss(sequences).backward()
            self.optimizer.step()
        return self

    def saved(self) -> bytes:
        """Model and optimizer as whole tensors, by parameter name."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "model": get_model_state_dict(self.model, options=options),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> "Run":
        state = torch.load(io.BytesIO(saved), weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        return self

    def weights(self) -> list[Tensor]:
        return [whole(parameter.detach()) for parameter in self.model.parameters()]


class _Loss(nn.Module):
    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences: Tensor) -> Tensor:
        return self.model.loss(sequences)


def _loss_of(model: Decoder, sequences: Tensor) -> Tensor:
    logits = model(sequences[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def weights_after(way: str, optimizer: OptimizerSpec, steps: int) -> list[Tensor]:
    return Run(way, optimizer).train(range(steps)).weights()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("way", "world"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)])
def test_several_processes_train_the_weights_of_one_bit_for_bit(name, way, world):
    alone = weights_after("alone", spec(name), 3)
    for weights in run(world, weights_after, way, spec(name), 3):
        assert equal(weights, alone)


@pytest.mark.parametrize(
    "options", [{"ns_dtype": "bf16"}, {"head_blocks": 2}, {"update_rms": "exact", "nesterov": False}]
)
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_options_mean_the_same_in_several_processes(way, options):
    alone = weights_after("alone", spec(**options), 2)
    assert all(equal(weights, alone) for weights in run(2, weights_after, way, spec(**options), 2))


def continued(way: str, optimizer: OptimizerSpec, saved: bytes, steps: range) -> tuple[list[Tensor], bytes]:
    ran = Run(way, optimizer).load(saved).train(steps)
    return ran.weights(), ran.saved()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_moves_between_strategies(name):
    alone = weights_after("alone", spec(name), 4)
    saved = Run("alone", spec(name)).train(range(1)).saved()
    for way, world, steps in [("ddp", 2, range(1, 2)), ("fsdp2", 2, range(2, 3)), ("ddp", 3, range(3, 4))]:
        results = run(world, continued, way, spec(name), saved, steps)
        saved = results[0][1]
    # Three replicas average their equal gradients to within a rounding; everything before was exact.
    for ours, expected in zip(results[0][0], alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert equal(Run("alone", spec(name)).load(saved).weights(), results[0][0])


def bytes_of_momentum() -> int:
    optimizer = Run("ddp", spec()).optimizer
    return sum(s["momentum"].numel() for s in optimizer.state.values() if "momentum" in s)


def test_owners_share_the_momentum_evenly():
    blocks = 3 * (4 * 32 * 32 + 3 * 32 * 86)
    shares = run(2, bytes_of_momentum)
    assert sum(shares) == blocks
    assert max(shares) - min(shares) <= 32 * 86


def test_owners_have_equal_numbers_and_costs_within_one_matrix():
    large, small = (64, 96), (32, 32)
    owners = assign_owners([small] * 3 + [large] * 7 + [small] * 3, 4)
    counts = [(owners[3:10].count(process), (owners[:3] + owners[10:]).count(process)) for process in range(4)]
    assert max(a for a, _ in counts) - min(a for a, _ in counts) == 1
    assert max(b for _, b in counts) - min(b for _, b in counts) == 1
    costs = [a * newton_schulz_flops(*large, 1) + b * newton_schulz_flops(*small, 1) for a, b in counts]
    assert max(costs) - min(costs) <= newton_schulz_flops(*large, 1)


NAMES = {
    "blocks.0.attention.query.weight": (5, 8),  # three processes of four hold rows, one of them a single row
    "blocks.0.attention.output.weight": (6, 8),
    "blocks.1.attention.output.weight": (6, 8),
    "blocks.0.feed_forward.router.weight": (1, 8),
    "blocks.0.feed_forward.experts.up": (3, 4, 6),
    "norm.weight": (8,),
}


def steps_and_state(sharded: bool) -> list[Tensor]:
    """Weights, then stored state, after three steps on parameters that are sharded by rows or whole everywhere."""
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None

    def placed(tensor: Tensor) -> Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    named = [(name, nn.Parameter(placed(torch.randn(s, generator=generator)))) for name, s in NAMES.items()]
    optimizer = build(spec("normuon"), named)
    for _ in range(3):
        for _, parameter in named:
            parameter.grad = placed(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    stored = optimizer.state_dict()["state"]
    tensors = [parameter.detach() for _, parameter in named] + [
        t for key in sorted(stored) for t in stored[key].values()
    ]
    return [whole(tensor) for tensor in tensors]


def test_uneven_and_empty_shards_and_experts_take_the_same_step():
    alone = steps_and_state(False)
    for tensors in run(4, steps_and_state, True):
        assert equal(tensors[:-2], alone[:-2])
        # torch's fused AdamW rounds the last few entries of a tensor its own way, and a shard of a norm is only those.
        for moment, expected in zip(tensors[-2:], alone[-2:], strict=True):
            torch.testing.assert_close(moment, expected, rtol=1e-6, atol=0)


def test_owners_of_single_experts_store_the_whole_state():
    alone = steps_and_state(False)
    assert all(equal(tensors, alone) for tensors in run(4, steps_and_state, False))


def refusal_of_columns() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
    try:
        build(spec(), [("blocks.0.attention.query.weight", weight)])
    except UserError as error:
        return str(error)
    return ""


def test_a_matrix_sharded_by_columns_is_refused_by_name():
    assert all("blocks.0.attention.query.weight" in sentence for sentence in run(2, refusal_of_columns))
