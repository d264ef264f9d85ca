import copy
import io
import os
import pickle
import random
import signal
import sys
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.model_config import ModelConfig
from scaling.models.decoder import Decoder
from scaling.optim.muon import accumulate_in_few_launches, accumulate_in_few_passes
from scaling.optim.newton_schulz.coefficients import polynomials
from scaling.optim.optimizer import GroupedOptimizer
from scaling.optim.registry import OPTIMIZERS, assign, build
from scaling.spec import OptimizerSpec
from scaling.training.shutdown import ShutdownRequest
from tests.scaling.optim.oracle import singular_value_after

SHAPE = ModelConfig(layers=2, width=32, heads=2, vocabulary=64, context=16, ffn_multiple=8)


def spec(name: str = "muon", *, peak_lr: float = 1e-2, weight_decay: float = 0.1, **options) -> OptimizerSpec:
    return OptimizerSpec(name=name, peak_lr=peak_lr, weight_decay=weight_decay, options=options)


def model_at(seed: int = 0) -> Decoder:
    model = Decoder(SHAPE)
    model.initialise(seed)
    return model


def train(model: Decoder, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Step k sees sequences that depend on k alone."""
    for step in steps:
        sequences = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.loss(sequences).backward()
        optimizer.step()


def saved_and_loaded(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def orthogonal_by_svd(matrix: Tensor) -> Tensor:
    """Keller's five steps in exact arithmetic, by way of the singular value decomposition."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    sent = [singular_value_after(float(value), polynomials("keller", 5)) for value in values]
    return (left * torch.tensor(sent, dtype=torch.float64)) @ right


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_are_the_papers_formula_in_float64(shape, nesterov):
    lr, decay, momentum = 0.05, 0.5, 0.95
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    expected, buffer = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer = build(
        spec(peak_lr=lr, weight_decay=decay, nesterov=nesterov, ns_dtype="fp32"),
        [("blocks.0.attention.query.weight", weight)],
    )
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        update = 0.2 * max(shape) ** 0.5 * orthogonal_by_svd(momentum * buffer + gradient if nesterov else buffer)
        expected = expected - lr * (update + decay * expected)
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in OPTIMIZERS), ("muon", {"update_rms": "exact"})])
def test_decay_is_the_learning_rate_times_lambda_everywhere(name, options):
    model = model_at()
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build(spec(name, peak_lr=0.5, weight_decay=1.0, **options), model.named_parameters()).step()
    for after, start in zip(model.parameters(), before.parameters(), strict=True):  # norms too: Moonlight, App. D
        torch.testing.assert_close(after, 0.5 * start)


def test_fifty_steps_stay_with_torchs_muon_and_adamw():
    ours, theirs = model_at(), model_at()
    options = {"ns_dtype": "bf16"}
    optimizer = build(spec(peak_lr=2e-3, **options), ours.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    by_name = dict(theirs.named_parameters())
    taken = {a.name: a.algorithm.name for a in assign(spec(), shapes)}
    muon = torch.optim.Muon(
        [by_name[name] for name in shapes if taken[name] == "muon"],
        lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        [by_name[name] for name in shapes if taken[name] == "adamw"], lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    start = model_at()
    for step in range(50):
        train(ours, optimizer, range(step, step + 1))
        sequences = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        theirs.loss(sequences).backward()
        muon.step()
        adamw.step()
    moved = sum((a - b).square().sum() for a, b in zip(theirs.parameters(), start.parameters(), strict=True)).sqrt()
    apart = sum((a - b).square().sum() for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)).sqrt()
    # bf16 keeps 8 bits: 0.4 % an entry and step, and the two average differently.
    assert apart / moved < 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_complete_before_the_first_step(name):
    model = model_at()
    optimizer = build(spec(name), model.named_parameters())
    fresh = optimizer.state_dict()
    train(model, optimizer, range(1))
    later = optimizer.state_dict()
    assert {k: set(v) for k, v in fresh["state"].items()} == {k: set(v) for k, v in later["state"].items()}
    assert len(fresh["state"]) == len(list(model.parameters()))
    assert all(isinstance(value, Tensor) for state in fresh["state"].values() for value in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_stopped_run_ends_as_if_it_had_never_stopped(name, at):
    whole = model_at()
    train(whole, build(spec(name), whole.named_parameters()), range(6))
    first = model_at()
    optimizer = build(spec(name), first.named_parameters())
    train(first, optimizer, range(at))
    point = saved_and_loaded({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    train(first, optimizer, range(at, 6))  # the live run goes on; the saved point must not move with it
    second = model_at(seed=1)
    second.load_state_dict(point["model"])
    continued = build(spec(name), second.named_parameters())
    continued.load_state_dict(point["optimizer"])
    train(second, continued, range(at, 6))
    assert same(first, whole)
    assert same(second, whole)


def test_a_stack_of_experts_moves_as_its_experts_would_alone():
    stack = nn.Parameter(torch.randn(3, 24, 16))
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    together = build(spec(), [("blocks.0.feed_forward.experts.up", stack)])
    apart = build(spec(), [(f"blocks.{i}.feed_forward.up.weight", matrix) for i, matrix in enumerate(alone)])
    for seed in range(2):
        gradient = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(seed))
        gradient[1] = 0  # an expert that no token chose
        stack.grad = gradient
        for matrix, part in zip(alone, gradient, strict=True):
            matrix.grad = part.clone()
        together.step()
        apart.step()
    assert torch.equal(stack, torch.stack([matrix.detach() for matrix in alone]))
    assert torch.isfinite(stack).all()


def test_heads_are_orthogonalised_and_scaled_each_for_itself():
    whole = nn.Parameter(torch.randn(32, 32))
    heads = [nn.Parameter(block.detach().clone()) for block in whole.chunk(4)]
    together = build(spec(head_blocks=4), [("blocks.0.attention.key.weight", whole)])
    apart = build(spec(), [(f"blocks.{i}.attention.key.weight", head) for i, head in enumerate(heads)])
    whole.grad = torch.randn(32, 32)
    for head, part in zip(heads, whole.grad.chunk(4), strict=True):
        head.grad = part.clone()
    together.step()
    apart.step()
    assert torch.equal(whole, torch.cat([head.detach() for head in heads]))


def test_a_parameter_without_gradient_is_left_alone():
    model = model_at()
    optimizer = build(spec(), model.named_parameters())
    frozen = model.blocks[0].attention.query.weight
    before = frozen.detach().clone()
    model.loss(torch.randint(64, (2, 17))).backward()
    frozen.grad = None
    optimizer.step()
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("shape", [(32, 32), (24, 80), (80, 24)])
def test_exact_mode_gives_each_update_its_rms(shape):
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = build(spec(peak_lr=1.0, update_rms="exact"), [("blocks.0.attention.output.weight", weight)])
    weight.grad = torch.randn(shape)
    optimizer.step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("ns_dtype", ["bf16", "fp32"])
def test_the_momentum_itself_is_never_normalised(ns_dtype):
    weight = nn.Parameter(torch.zeros(16, 24))
    optimizer = build(spec(nesterov=False, ns_dtype=ns_dtype), [("blocks.0.attention.value.weight", weight)])
    weight.grad = torch.randn(16, 24)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum"], weight.grad)


@pytest.mark.parametrize("seed", range(3))
def test_a_signal_inside_a_step_leaves_the_checkpoint_whole(seed):
    """The signal only sets a flag; the state is taken at the border that follows, and continues bit for bit."""
    whole = model_at()
    train(whole, build(spec(), whole.named_parameters()), range(6))

    model, stop = model_at(), ShutdownRequest()
    optimizer = build(spec(), model.named_parameters())
    train(model, optimizer, range(2))
    seen_inside = []
    places = random.Random(seed).sample(range(200), 1)

    def interrupt(frame: FrameType, event: str, argument: object) -> object:
        if event == "line" and frame.f_code.co_filename.endswith(("muon.py", "optimizer.py", "iteration.py")):
            seen_inside.append(frame.f_lineno)
            if len(seen_inside) - 1 in places:
                os.kill(os.getpid(), signal.SIGUSR2)
        return interrupt

    with stop.listening():
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            train(model, optimizer, range(2, 3))
        finally:
            sys.settrace(before)
    assert len(seen_inside) > 200
    assert stop.reason == "SIGUSR2"
    point = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = model_at(seed=1)
    resumed.load_state_dict(point["model"])
    continued = build(spec(), resumed.named_parameters())
    continued.load_state_dict(point["optimizer"])
    train(resumed, continued, range(3, 6))
    assert same(resumed, whole)


def test_weights_stored_in_bf16_are_refused_by_name():
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"blocks\.0\.attention\.key\.weight is stored in torch\.bfloat16"):
        build(spec(), [("blocks.0.attention.key.weight", weight)])


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpus_way_to_accumulate_is_the_cpus(nesterov, dtype):
    gradients = list(torch.randn(3, 8, 12))
    ways = []
    for accumulate in (accumulate_in_few_passes, accumulate_in_few_launches):
        momenta = [gradient.flip(0).clone() for gradient in gradients]
        x = torch.empty(3, 8, 12, dtype=dtype)
        accumulate(momenta, gradients, x, 0.95, nesterov)
        ways.append((torch.stack(momenta), x))
    torch.testing.assert_close(ways[0][0], ways[1][0])
    torch.testing.assert_close(ways[0][1], ways[1][1])
    torch.testing.assert_close(ways[0][0], torch.stack([0.95 * g.flip(0) + g for g in gradients]))


def pickled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copied_optimizer_takes_the_same_steps(name, duplicate):
    model = model_at()
    optimizer = build(spec(name), model.named_parameters())
    train(model, optimizer, range(2))
    again, twin = model_at(), duplicate(optimizer)
    # The copy has parameters of its own, in the order of its groups.
    names = [name for group in twin.param_groups for name in group["param_names"]]
    for name, parameter in zip(names, (p for group in twin.param_groups for p in group["params"]), strict=True):
        module, _, attribute = name.rpartition(".")
        setattr(again.get_submodule(module), attribute, parameter)
    for each, steps in ((model, optimizer), (again, twin)):
        train(each, steps, range(2, 4))
    assert same(model, again)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_that_is_added_later_takes_the_same_steps(name):
    together, apart = model_at(), model_at()
    whole = build(spec(name), together.named_parameters())
    late = build(spec(name), apart.named_parameters())
    *first, last = late.param_groups
    built = GroupedOptimizer([as_given(group) for group in first or [last]], late.updates, type(late.sharding)())
    if first:
        built.add_param_group(as_given(last))
    train(together, whole, range(3))
    train(apart, built, range(3))
    assert same(together, apart)


def as_given(group: dict) -> dict:
    """A group as it was given to the optimizer: names with parameters."""
    given = {key: value for key, value in group.items() if key != "param_names"}
    return {**given, "params": list(zip(group["param_names"], group["params"], strict=True))}


def test_one_parameter_under_two_names_is_refused():
    weight = nn.Parameter(torch.zeros(4, 4))
    names = [f"blocks.0.attention.{name}.weight" for name in ("query", "key")]
    with pytest.raises(UserError, match=r"query.weight and blocks.0.attention.key.weight are one parameter"):
        build(spec(), [(name, weight) for name in names])
