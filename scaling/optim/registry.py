"""The optimizers a run can name, one row each: options, rules that assign parameters to algorithms, search ranges.

An element-wise optimizer is one file and one row::

    class Lion(ElementwiseUpdate): ...                   # init_state and step, scaling.optim.optimizer

    LION = Algorithm(name="lion", update=Lion)
    ROW = OptimizerRecipe(
        label="Lion",
        options=LionOptions,                             # a Strict with defaults
        rules=lambda options: (GroupRule(pattern=".*", algorithm=LION),),
        groups=lambda spec, options: {"lion": {"lr": spec.peak_lr, "weight_decay": spec.weight_decay, ...}},
    )

A relative of Muon subclasses `scaling.optim.muon.Muon` and takes `matrix_rules` and `matrix_groups`. An installed
package adds a row by the entry point group ``scaling_harness.optimizers``. Planning reads this table too, so torch is
imported only when an algorithm's `update` is called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from scaling.errors import UserError
from scaling.io import Strict, typed_options
from scaling.optim.newton_schulz.coefficients import newton_schulz_flops
from scaling.optim.newton_schulz.views import matrices
from scaling.optim.options import AdamWOptions, MatrixOptions, MuonOptions, NorMuonOptions
from scaling.optim.search_space import SearchRange
from scaling.registry import Registry
from scaling.spec import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from scaling.optim.muon import Muon
    from scaling.optim.normuon import NorMuon
    from scaling.optim.optimizer import AdamW, GroupedOptimizer, Update


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The algorithm of a parameter group: its update, and the FLOPs of it."""

    name: str
    """Its name in parameter groups, and so in checkpoints."""
    update: Callable[[], Update]
    """Makes its state and step: an `ElementwiseUpdate` or a `MatrixUpdate` of `scaling.optim.optimizer`."""
    is_matrix: bool = False
    """True if it treats matrices as a whole; its parameters are then seen through the view of their rule."""
    supports_zero1: bool = True
    """True if each of its state tensors is shaped like the parameter, so that it can be cut between any two entries."""
    flops: Callable[[Any, int, int], int] = lambda options, rows, columns: 0
    """Matrix-product FLOPs of a step of one matrix, from the completed options, its rows and its columns; element-wise
    operations are not counted."""


class GroupRule(Strict, frozen=True):
    """Parameters whose whole name matches `pattern` take `algorithm`, seen through `view` (`newton_schulz.views`)."""

    pattern: str
    algorithm: Algorithm
    view: str = "whole"


class Assignment(Strict, frozen=True):
    """The algorithm and view of one parameter, and the pattern of the rule that gave them."""

    name: str
    shape: tuple[int, ...]
    algorithm: Algorithm
    view: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """One row of `OPTIMIZERS`."""

    label: str
    """Its name in sentences and model cards."""
    options: type[Strict]
    rules: Callable[[Any], tuple[GroupRule, ...]]
    """Rules in order, the first match wins; from the completed options."""
    groups: Callable[[OptimizerSpec, Any], dict[str, dict[str, Any]]]
    """Hyper-parameters of a parameter group by the name of its algorithm; from the completed spec and its options."""
    search: tuple[SearchRange, ...] = ()
    """Hyper-parameters that can be tuned, and the range in which a search begins."""


def _load_adamw() -> AdamW:
    from scaling.optim.optimizer import AdamW

    return AdamW()


def _load_muon() -> Muon:
    from scaling.optim.muon import Muon

    return Muon()


def _load_normuon() -> NorMuon:
    from scaling.optim.normuon import NorMuon

    return NorMuon()


def orthogonalisation_flops(options: MatrixOptions, rows: int, columns: int) -> int:
    """FLOPs of Newton-Schulz on one matrix."""
    return newton_schulz_flops(rows, columns, options.ns_steps, options.form)


ADAMW = Algorithm(name="adamw", update=_load_adamw)
MUON = Algorithm(name="muon", update=_load_muon, is_matrix=True, flops=orthogonalisation_flops)
NORMUON = Algorithm(
    name="normuon", update=_load_normuon, is_matrix=True, supports_zero1=False, flops=orthogonalisation_flops
)

RATE = SearchRange(name="peak_lr", scale="log", low=3e-4, high=3e-2, least=1e-6, most=1.0)
DECAY = SearchRange(name="weight_decay", scale="log", low=0.02, high=0.5, least=1e-4, most=3.0)


def _second_moment(name: str) -> SearchRange:
    return SearchRange(name=name, scale="complement", low=0.8, high=0.99, least=0.5, most=0.9999)


MATRIX_SEARCH = (
    RATE,
    DECAY,
    SearchRange(name="momentum", scale="complement", low=0.85, high=0.985, least=0.5, most=0.999),
    # Relative to the run's peak, so that it stays right while peak_lr is searched.
    SearchRange(name="adamw_lr_factor", scale="log", low=0.25, high=4.0, least=0.01, most=100.0),
    _second_moment("adamw_beta2"),
)


def matrix_rules(algorithm: Algorithm) -> Callable[[MatrixOptions], tuple[GroupRule, ...]]:
    """Moonlight's division: `algorithm` for the matrices of the blocks, AdamW for embedding, head and norms."""

    def rules(options: MatrixOptions) -> tuple[GroupRule, ...]:
        # Heads of a projection are blocks of its rows; output and latent projections mix heads and stay whole.
        per_head = "whole" if options.head_blocks == 1 else f"rows/{options.head_blocks}"
        feed_forward = r"blocks\.\d+\.feed_forward\."
        return (
            # Vectors, and the matrices whose rows belong to tokens, stay with AdamW (Moonlight, Section 2.1).
            GroupRule(pattern=r"(embedding|head)\.weight", algorithm=ADAMW),
            GroupRule(pattern=r"(.+[._])?norm\.weight", algorithm=ADAMW),
            GroupRule(pattern=r"blocks\.\d+\.attention\.(query|key|value)\.weight", algorithm=algorithm, view=per_head),
            GroupRule(pattern=r"blocks\.\d+\.attention\.\w+\.weight", algorithm=algorithm),
            GroupRule(pattern=feed_forward + r"(shared\.)?(gate|up|down)\.weight", algorithm=algorithm),
            GroupRule(pattern=feed_forward + r"experts\.(gate|up|down)", algorithm=algorithm, view="experts"),
            # The router is a matrix like any other in Moonlight (its Figure 4).
            GroupRule(pattern=feed_forward + r"router\.weight", algorithm=algorithm),
        )

    return rules


def _adamw_groups(spec: OptimizerSpec, options: AdamWOptions) -> dict[str, dict[str, Any]]:
    return {
        ADAMW.name: {
            "lr": spec.peak_lr,
            "weight_decay": spec.weight_decay,
            "betas": (options.beta1, options.beta2),
            "eps": options.epsilon,
        }
    }


ELSEWHERE = frozenset({"head_blocks", "qk_clip"})
"""Options that are read by the rules or by the training loop, not by the update."""


def matrix_groups(algorithm: Algorithm) -> Callable[[OptimizerSpec, MatrixOptions], dict[str, dict[str, Any]]]:
    """Hyper-parameters of `algorithm`, and of AdamW beside it by the options with the prefix ``adamw_``."""

    def groups(spec: OptimizerSpec, options: MatrixOptions) -> dict[str, dict[str, Any]]:
        own = {
            name: value
            for name, value in msgspec.structs.asdict(options).items()
            if not name.startswith("adamw_") and name not in ELSEWHERE
        }
        return {
            algorithm.name: {
                "lr": spec.peak_lr,
                "weight_decay": spec.weight_decay,
                # The rescaling at the end of NorMuon's algorithm is Muon's exact mode.
                "update_rms": "exact",
                **own,
            },
            ADAMW.name: {
                "lr": spec.peak_lr * options.adamw_lr_factor,
                "weight_decay": spec.weight_decay * options.adamw_decay_factor,
                "betas": (options.adamw_beta1, options.adamw_beta2),
                "eps": options.adamw_epsilon,
            },
        }

    return groups


OPTIMIZERS: Registry[OptimizerRecipe] = Registry(
    "optimizer",
    "optimizers",
    {
        "adamw": OptimizerRecipe(
            label="AdamW",
            options=AdamWOptions,
            rules=lambda options: (GroupRule(pattern=r".*", algorithm=ADAMW),),
            groups=_adamw_groups,
            search=(RATE, DECAY, _second_moment("beta2")),
        ),
        "muon": OptimizerRecipe(
            label="Muon",
            options=MuonOptions,
            rules=matrix_rules(MUON),
            groups=matrix_groups(MUON),
            search=MATRIX_SEARCH,
        ),
        "normuon": OptimizerRecipe(
            label="NorMuon",
            options=NorMuonOptions,
            rules=matrix_rules(NORMUON),
            groups=matrix_groups(NORMUON),
            search=MATRIX_SEARCH,
        ),
    },
)
"""Optimizers by the name that a spec writes."""


def options_of(spec: OptimizerSpec) -> Strict:
    """The typed options of a spec, defaults filled in."""
    return typed_options(spec.options, OPTIMIZERS.row(spec.name).options, owner=spec.name)


def complete(spec: OptimizerSpec) -> OptimizerSpec:
    """The spec with every option of its optimizer written out; one that is None by default and stays so is left out."""
    options: dict[str, float | int | bool | str | None] = msgspec.to_builtins(options_of(spec))
    return msgspec.structs.replace(spec, options={name: v for name, v in options.items() if v is not None})


def assign(spec: OptimizerSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[Assignment]:
    """Algorithm and view of each parameter, in the order of `shapes`; each is claimed by exactly one rule.

    Raises:
        UserError: No rule claims a parameter, or its shape does not fit the view.
    """
    row = OPTIMIZERS.row(spec.name)
    rules = row.rules(options_of(spec))
    assignments = []
    for name, shape in shapes.items():
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            raise UserError(
                f"parameter {name} {tuple(shape)} is claimed by no rule of {row.label}. Add one to its row of "
                "scaling.optim.registry.OPTIMIZERS; nothing is assigned by default, so that no parameter is trained by "
                "mistake."
            )
        if rule.algorithm.is_matrix:
            matrices(name, tuple(shape), rule.view)
        assignments.append(
            Assignment(name=name, shape=tuple(shape), algorithm=rule.algorithm, view=rule.view, rule=rule.pattern)
        )
    return assignments


def qk_clip_bound(spec: OptimizerSpec) -> float | None:
    """The bound of attention logits among the options of any optimizer; None where it has no such option."""
    bound: float | None = getattr(options_of(spec), "qk_clip", None)
    return bound


def check_strategy(spec: OptimizerSpec, strategy: Literal["ddp", "fsdp2", "zero1"]) -> None:
    """Refuse an optimizer whose state the strategy cannot distribute."""

    def supported(row: OptimizerRecipe, options: Strict) -> bool:
        return all(rule.algorithm.supports_zero1 for rule in row.rules(options))

    row = OPTIMIZERS.row(spec.name)
    if strategy == "zero1" and not supported(row, options_of(spec)):
        others = [name for name, other in OPTIMIZERS.items() if supported(other, other.options())]
        raise UserError(
            f'placement: strategy = "zero1" cuts matrices between any two entries, and {row.label} keeps state that is not '
            f'shaped like its parameters. Use strategy = "ddp" or "fsdp2", or one of the optimizers {", ".join(others)}.'
        )


def build(
    spec: OptimizerSpec,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    strategy: Literal["ddp", "fsdp2", "zero1"] = "ddp",
) -> GroupedOptimizer:
    """The optimizer of a run, with one parameter group for each algorithm and view.

    A group carries `algorithm`, `view`, `lr` and `peak_lr`; the training loop sets ``lr`` to ``peak_lr`` times the
    schedule's share before each step.

    Args:
        spec: The optimizer.
        named_parameters: All parameters of the model, once each.
        strategy: `scaling.spec.Placement.strategy`, for several processes.

    Raises:
        UserError: `assign` or `check_strategy` fails, two parameters have one name, or one parameter has two names.
    """
    from scaling.optim.optimizer import GroupedOptimizer, MatrixUpdate, sharding_strategy_for

    check_strategy(spec, strategy)
    named = list(named_parameters)
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise UserError(f"parameters {', '.join(twice)} were given twice; pass model.named_parameters() once.")
    # By identity: two equal tensors are two parameters, one tensor under two names is one.
    names: dict[int, str] = {}
    for name, parameter in named:
        if (first := names.setdefault(id(parameter), name)) != name:
            raise UserError(
                f"{first} and {name} are one parameter, which would take two steps at once. Give it under one name, as "
                "model.named_parameters() does."
            )
    hyper = OPTIMIZERS.row(spec.name).groups(spec, options_of(spec))
    parameters = dict(named)
    algorithms: dict[str, Algorithm] = {}
    # One group for each algorithm and view, so that equal matrices of all layers are in one group and can be batched.
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for assignment in assign(spec, {name: tuple(parameter.shape) for name, parameter in named}):
        algorithm = algorithms.setdefault(assignment.algorithm.name, assignment.algorithm)
        own = hyper[algorithm.name]
        group = groups.setdefault(
            (algorithm.name, assignment.view),
            {"params": [], "algorithm": algorithm.name, "view": assignment.view, **own, "peak_lr": own["lr"]},
        )
        group["params"].append((assignment.name, parameters[assignment.name]))
    updates = {name: algorithm.update() for name, algorithm in algorithms.items()}
    for name, update in updates.items():
        if isinstance(update, MatrixUpdate) != algorithms[name].is_matrix:
            raise UserError(
                f"algorithm {name} states is_matrix = {algorithms[name].is_matrix}, and its update is a "
                f"{type(update).__name__}. Set is_matrix to true for a MatrixUpdate, and to false for an ElementwiseUpdate."
            )
    sharding = sharding_strategy_for((parameter for _, parameter in named), zero1=strategy == "zero1")
    return GroupedOptimizer(groups.values(), updates, sharding)
