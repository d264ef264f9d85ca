"""The optimizers a run can name, one row each: options, rules that say which weights go where, a builder.

Planning reads this table too, so torch is imported only inside the builders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from scaling.errors import UserError, unknown_name
from scaling.io import Strict
from scaling.optim.newton_schulz.views import matrices
from scaling.optim.options import AdamWOptions, MatrixOptions, MuonOptions, NorMuonOptions
from scaling.optim.search_space import SearchRange
from scaling.spec import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class GroupRule(Strict, frozen=True):
    """Parameters whose whole name matches `pattern` take `algorithm`, seen through `view` (`scaling.optim.newton_schulz.views`)."""

    pattern: str
    algorithm: str
    view: str = "whole"


class Assignment(Strict, frozen=True):
    """What an optimizer does with one parameter, and the rule that says so."""

    name: str
    shape: tuple[int, ...]
    algorithm: str
    view: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """One row of `OPTIMIZERS`."""

    label: str
    """How figures and tables call it."""
    options: type[Strict]
    rules: Callable[[Any], tuple[GroupRule, ...]]
    """Rules in order, the first match wins; from the completed options."""
    groups: Callable[[OptimizerSpec, Any], dict[str, dict[str, Any]]]
    """Hyper-parameters of a parameter group, by algorithm; from the completed spec and its options."""
    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    """Parameter groups to optimizer."""
    search: tuple[SearchRange, ...] = ()
    """What can be tuned, and where a search begins."""


RATE = SearchRange(name="peak_lr", scale="log", low=3e-4, high=3e-2, least=1e-6, most=1.0)
DECAY = SearchRange(name="weight_decay", scale="log", low=0.02, high=0.5, least=1e-4, most=3.0)


def _second_moment(name: str) -> SearchRange:
    return SearchRange(name=name, scale="complement", low=0.8, high=0.99, least=0.5, most=0.9999)


MATRIX_SEARCH = (
    RATE,
    DECAY,
    SearchRange(name="momentum", scale="complement", low=0.85, high=0.985, least=0.5, most=0.999),
    SearchRange(name="adamw_lr_factor", scale="log", low=0.25, high=4.0, least=0.01, most=100.0),
    _second_moment("adamw_beta2"),
)


def _adamw_rules(options: AdamWOptions) -> tuple[GroupRule, ...]:
    return (GroupRule(pattern=r".*", algorithm="adamw"),)


def _matrix_rules(algorithm: str) -> Callable[[MatrixOptions], tuple[GroupRule, ...]]:
    """Moonlight's division: the matrices of the blocks, and AdamW for embedding, head and norms."""

    def rules(options: MatrixOptions) -> tuple[GroupRule, ...]:
        per_head = "whole" if options.head_blocks == 1 else f"rows/{options.head_blocks}"
        feed_forward = r"blocks\.\d+\.feed_forward\."
        return (
            GroupRule(pattern=r"(embedding|head)\.weight", algorithm="adamw"),
            GroupRule(pattern=r"(.+[._])?norm\.weight", algorithm="adamw"),
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
        "adamw": {
            "lr": spec.peak_lr,
            "weight_decay": spec.weight_decay,
            "betas": (options.beta1, options.beta2),
            "eps": options.epsilon,
        }
    }


def _matrix_groups(spec: OptimizerSpec, options: MatrixOptions) -> dict[str, dict[str, Any]]:
    elsewhere = {field for field in MatrixOptions.__struct_fields__ if field.startswith("adamw_")} | {
        "head_blocks",
        "qk_clip",
    }
    return {
        spec.name: {
            "lr": spec.peak_lr,
            "weight_decay": spec.weight_decay,
            # The rescaling at the end of NorMuon's algorithm is Muon's exact mode.
            "update_rms": "exact",
            **{name: value for name, value in msgspec.structs.asdict(options).items() if name not in elsewhere},
        },
        "adamw": {
            "lr": spec.peak_lr * options.adamw_lr_factor,
            "weight_decay": spec.weight_decay * options.adamw_decay_factor,
            "betas": (options.adamw_beta1, options.adamw_beta2),
            "eps": options.adamw_epsilon,
        },
    }


def _muon(groups: list[dict[str, Any]]) -> Optimizer:
    from scaling.optim.distributed.select import sharding_strategy_for
    from scaling.optim.muon import MuonAdamW

    return MuonAdamW(groups, sharding_strategy_for(parameter for group in groups for _, parameter in group["params"]))


def _normuon(groups: list[dict[str, Any]]) -> Optimizer:
    from scaling.optim.distributed.select import sharding_strategy_for
    from scaling.optim.normuon import NorMuonAdamW

    return NorMuonAdamW(
        groups, sharding_strategy_for(parameter for group in groups for _, parameter in group["params"])
    )


OPTIMIZERS: dict[str, OptimizerRecipe] = {
    "adamw": OptimizerRecipe(
        label="AdamW",
        options=AdamWOptions,
        rules=_adamw_rules,
        groups=_adamw_groups,
        optimizer=_muon,
        search=(RATE, DECAY, _second_moment("beta2")),
    ),
    "muon": OptimizerRecipe(
        label="Muon",
        options=MuonOptions,
        rules=_matrix_rules("muon"),
        groups=_matrix_groups,
        optimizer=_muon,
        search=MATRIX_SEARCH,
    ),
    "normuon": OptimizerRecipe(
        label="NorMuon",
        options=NorMuonOptions,
        rules=_matrix_rules("normuon"),
        groups=_matrix_groups,
        optimizer=_normuon,
        search=MATRIX_SEARCH,
    ),
}
"""Optimizers by the name that a spec writes."""


def recipe(name: str) -> OptimizerRecipe:
    """The row of an optimizer.

    Raises:
        UserError: There is none of that name.
    """
    if name not in OPTIMIZERS:
        raise UserError(unknown_name("optimizer", name, OPTIMIZERS))
    return OPTIMIZERS[name]


def options_of(spec: OptimizerSpec) -> Strict:
    """The typed options of a spec, defaults filled in.

    Raises:
        UserError: The optimizer or an option is not known, or a value has the wrong type or range.
    """
    options = recipe(spec.name).options
    known = {field.name: field for field in msgspec.structs.fields(options)}
    for name, value in spec.options.items():
        if name not in known:
            raise UserError(unknown_name(f"option of {spec.name}", name, known))
        try:
            msgspec.convert(value, type=known[name].type)
        except msgspec.ValidationError as error:
            raise UserError(
                f"option {name} of {spec.name} is {value!r}: {error}. Its default is {known[name].default!r}."
            ) from None
    return msgspec.convert(spec.options, type=options)


def complete(spec: OptimizerSpec) -> OptimizerSpec:
    """The spec with every option of its optimizer written out; one that is None by default and stays so is left out.

    Raises:
        UserError: The optimizer or an option is not known, or a value has the wrong type or range.
    """
    options: dict[str, float | int | bool | str | None] = msgspec.to_builtins(options_of(spec))
    return msgspec.structs.replace(spec, options={name: v for name, v in options.items() if v is not None})


def assign(spec: OptimizerSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[Assignment]:
    """Which algorithm and view each parameter gets, in the order of `shapes`; each is claimed by exactly one rule.

    Raises:
        UserError: No rule claims a parameter, or its shape does not fit the view.
    """
    rules = recipe(spec.name).rules(options_of(spec))
    assignments = []
    for name, shape in shapes.items():
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            raise UserError(
                f"parameter {name} {tuple(shape)} is claimed by no rule of {spec.name}. "
                "Add one in scaling/optim/registry.py; nothing is assigned by default, so that no weight trains by mistake."
            )
        if rule.algorithm != "adamw":
            matrices(name, tuple(shape), rule.view)
        assignments.append(
            Assignment(name=name, shape=tuple(shape), algorithm=rule.algorithm, view=rule.view, rule=rule.pattern)
        )
    return assignments


def qk_clip_bound(spec: OptimizerSpec) -> float | None:
    """The bound of attention logits that a run asks for, whatever its optimizer."""
    bound: float | None = getattr(options_of(spec), "qk_clip", None)
    return bound


def build(spec: OptimizerSpec, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """The optimizer of a run, with one parameter group for each algorithm and view.

    A group carries `algorithm`, `view`, `lr` and `peak_lr`; the training loop sets ``lr`` to ``peak_lr`` times the
    schedule's share before each step.

    Raises:
        UserError: As `assign`; or two parameters have one name, or one parameter two.
    """
    named = list(named_parameters)
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise UserError(f"parameters {', '.join(twice)} were given twice; pass model.named_parameters() once.")
    names: dict[int, str] = {}
    for name, parameter in named:
        if (first := names.setdefault(id(parameter), name)) != name:
            raise UserError(
                f"{first} and {name} are one parameter, which would take two steps at once. Give it under one name, as "
                "model.named_parameters() does."
            )
    row = recipe(spec.name)
    hyper = row.groups(spec, options_of(spec))
    parameters = dict(named)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for assignment in assign(spec, {name: tuple(parameter.shape) for name, parameter in named}):
        key = (assignment.algorithm, assignment.view)
        group = groups.setdefault(
            key,
            {"params": [], "algorithm": key[0], "view": key[1], **hyper[key[0]], "peak_lr": hyper[key[0]]["lr"]},
        )
        group["params"].append((assignment.name, parameters[assignment.name]))
    return row.optimizer(list(groups.values()))
