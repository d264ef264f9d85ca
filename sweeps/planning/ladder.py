"""The rungs of a campaign: model sizes with their budgets, listed in the file or made by a ladder.

Everything here is a pure function of the campaign. To add a kind of ladder, write a function like `isoflop` and add it to
`LADDERS`; further fields go into `sweeps.config.campaign.LadderConfig`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from scaling.errors import ConfigError, UserError, unknown_name
from scaling.flops import DepthLine, count_parameters, depth_line, train_flops_per_token
from scaling.model_config import ModelConfig
from scaling.units import human
from sweeps.config.campaign import ArmConfig, Campaign, LadderConfig, RungConfig, SharedModelConfig
from sweeps.config.hyperparameter_rules import RuleSet, rule_set
from sweeps.config.toml import located


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One model size with its budget, all numbers final."""

    name: str
    shape: ModelConfig
    tokens: int
    batch_tokens: int
    peak_lr: float | None
    """Rate of the arms that have none of their own."""
    seeds: tuple[int, ...]
    compute: float
    """Training FLOPs (6ND) at which rules are evaluated; a rule's own value where the rule sets the tokens."""
    printed: dict[str, str] = {}

    @property
    def parameters(self) -> int:
        """Parameters of the blocks: the papers' N."""
        return count_parameters(self.shape).blocks


def rungs_of(campaign: Campaign) -> list[Rung]:
    """All rungs, in the order of the file or of rising compute."""
    if campaign.ladder is not None:
        return _laddered(campaign, campaign.ladder)
    return [_listed(campaign, table) for table in campaign.rungs]


MAX_FFN_ROUNDING = 1.25
"""Ratio of a feed-forward's hidden units to 8/3 of the width above which the plan warns of the rounding."""


def widened(rungs: list[Rung]) -> str | None:
    """A sentence on the rungs whose feed-forward is much wider than 8/3 of the width because of `ffn_multiple`."""
    found = {
        f"{rung.name} ({8 * rung.shape.width / 3:.0f} to {rung.shape.ffn_width:,})": rung.shape
        for rung in rungs
        if rung.shape.ffn is None and rung.shape.ffn_width > MAX_FFN_ROUNDING * 8 * rung.shape.width / 3
    }
    if not found:
        return None
    multiple = next(iter(found.values())).ffn_multiple
    # A multiple of at most two thirds of the width adds at most a quarter.
    least = 2 ** max(0, math.floor(math.log2(2 * min(shape.width for shape in found.values()) / 3)))
    return (
        f"ffn_multiple = {multiple} rounds the hidden units of the feed-forward up by more than a quarter at "
        f"{', '.join(found)}, so these models differ in shape from the others. Use ffn_multiple = {least} in [model], or "
        "set ffn in the rungs."
    )


def peak_lr(campaign: Campaign, arm: ArmConfig, rung: Rung) -> float:
    """The peak learning rate of an arm at a rung: the arm's own, the rung's, the campaign's, or a rule's.

    Raises:
        ConfigError: It is given nowhere, or the rule set has no rule for it.
    """
    settled = campaign.settings.get(arm.reuse or arm.name, {}).get(rung.name, {}).get("peak_lr")
    if settled is not None:
        return settled
    name = arm.rule or (campaign.rule if campaign.hyperparameters == "rule" else None)
    if name is not None:
        return rule_set(name).value("peak_lr", compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens)
    own = arm.peak_lr.get(rung.name) if isinstance(arm.peak_lr, dict) else arm.peak_lr
    for rate in (own, rung.peak_lr, campaign.training.peak_lr):
        if rate is not None:
            return rate
    raise ConfigError("no peak_lr is given. Put one into the arm, the rung or [training], or name a rule in the arm.")


def _listed(campaign: Campaign, table: RungConfig) -> Rung:
    training = campaign.training
    with located(f'{campaign.file}, rung "{table.name}"'):
        shape = _shape(campaign.model, layers=table.layers, width=table.width, heads=table.heads, ffn=table.ffn)
        if table.tokens is not None and table.tokens_per_parameter is not None:
            raise ConfigError("has both tokens and tokens_per_parameter. Keep one of them.")
        parameters, rules = _blocks(shape), _rules(campaign)
        ratio = table.tokens_per_parameter or (training.tokens_per_parameter if table.tokens is None else None)
        tokens = table.tokens if ratio is None else round(ratio * parameters)
        compute = None
        if rules is not None and {"parameters", "tokens"} <= rules.rules.keys():
            compute = rules.compute_for(parameters)
            tokens = round(rules.value("tokens", compute=compute))
        if tokens is None:
            raise ConfigError(
                "the number of training tokens is missing. "
                "Give the rung tokens or tokens_per_parameter, or give [training] tokens_per_parameter."
            )
        compute = compute or float(train_flops_per_token(shape) * tokens)
        return Rung(
            name=table.name,
            shape=shape,
            tokens=tokens,
            batch_tokens=_batch(rules, table.batch_tokens or training.batch_tokens, shape, compute, tokens),
            peak_lr=table.peak_lr,
            seeds=campaign.seeds if table.seeds is None else table.seeds,
            compute=compute,
            printed=table.printed,
        )


def _rules(campaign: Campaign) -> RuleSet | None:
    return rule_set(campaign.rule) if campaign.hyperparameters == "rule" and campaign.rule else None


def _batch(rules: RuleSet | None, listed: int | None, shape: ModelConfig, compute: float, tokens: int) -> int:
    if rules is not None and "batch_tokens" in rules.rules:
        wanted = rules.value("batch_tokens", compute=compute, parameters=_blocks(shape), tokens=tokens)
        return max(1, round(wanted / shape.context)) * shape.context
    if listed is None:
        raise ConfigError("no batch_tokens is given. Put it into the rung or into [training].")
    return listed


class LadderPoint(NamedTuple):
    """One rung that a ladder makes."""

    shape: ModelConfig
    compute: float
    """Training FLOPs (6ND)."""
    tokens: int | None = None
    """Training tokens; None spends `compute`."""
    prefix: str = ""
    """Start of the rung's name, where sizes repeat."""


def compute_optimal(campaign: Campaign, table: LadderConfig, split: RuleSet) -> list[LadderPoint]:
    """One rung for each of `computes` or `sizes`, at the size and tokens of the rule."""
    points = []
    for compute in sorted(table.computes):
        points.append(LadderPoint(shape_near(split.value("parameters", compute=compute), campaign, table), compute))
    for size in sorted(table.sizes):
        shape = shape_near(size, campaign, table)
        compute = split.compute_for(_blocks(shape))
        points.append(LadderPoint(shape, compute, tokens=round(split.value("tokens", compute=compute))))
    return points


def isoflop(campaign: Campaign, table: LadderConfig, split: RuleSet) -> list[LadderPoint]:
    """For each of `computes` a profile: sizes around the rule's, all trained with that compute."""
    if table.sizes:
        raise ConfigError("an isoFLOP profile is made at a compute. Replace sizes by computes, in FLOPs.")
    points = []
    for compute in sorted(table.computes):
        centre = split.value("parameters", compute=compute)
        steps = [2 * point / (table.points - 1) - 1 for point in range(table.points)]
        shapes = {shape_near(centre * table.spread**step, campaign, table) for step in steps}
        if len(shapes) < 3:
            raise ConfigError(
                f"the profile at {compute:g} FLOPs has only {len(shapes)} different models around {human(centre)} "
                "parameters. Use a wider spread, a smaller head_size, or more compute."
            )
        prefix = f"{compute:.1e}-".replace("+", "")
        points += [LadderPoint(shape, compute, prefix=prefix) for shape in sorted(shapes, key=_blocks)]
    return points


LADDERS: dict[str, Callable[[Campaign, LadderConfig, RuleSet], list[LadderPoint]]] = {
    "compute-optimal": compute_optimal,
    "isoflop": isoflop,
}
"""Kinds of ``[ladder]``."""


def _laddered(campaign: Campaign, table: LadderConfig) -> list[Rung]:
    where = f"{campaign.file}, [ladder]"
    if bool(table.computes) == bool(table.sizes):
        found = "both computes and sizes" if table.sizes else "neither computes nor sizes"
        raise ConfigError(f"{where}: {found}. Give one of them: computes in FLOPs, or sizes in parameters.")
    split, rules = rule_set(table.rule), _rules(campaign)
    with located(where):
        if table.kind not in LADDERS:
            raise ConfigError(unknown_name("kind of ladder", table.kind, LADDERS))
        made = [_made(campaign, rules, point) for point in LADDERS[table.kind](campaign, table, split)]
        names = [rung.name for rung in made]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"two rungs become the same model, {', '.join(twice)}. "
                "Put the sizes further apart, or make head_size smaller."
            )
    return made


def _blocks(shape: ModelConfig) -> int:
    return count_parameters(shape).blocks


def _made(campaign: Campaign, rules: RuleSet | None, point: LadderPoint) -> Rung:
    shape, compute = point.shape, point.compute
    name = point.prefix + human(_blocks(shape))
    tokens = point.tokens or max(1, round(compute / train_flops_per_token(shape)))
    with located(f'rung "{name}"'):
        batch_tokens = _batch(rules, campaign.training.batch_tokens, shape, compute, tokens)
    return Rung(
        name=name,
        shape=shape,
        tokens=tokens,
        batch_tokens=batch_tokens,
        peak_lr=None,
        seeds=campaign.seeds,
        compute=compute,
    )


def _shape(model: SharedModelConfig, *, layers: int, width: int, heads: int, ffn: int | None = None) -> ModelConfig:
    return ModelConfig(layers=layers, width=width, heads=heads, ffn=ffn, **msgspec.structs.asdict(model))


MAX_LAYERS = 200


def shape_near(parameters: float, campaign: Campaign, table: LadderConfig) -> ModelConfig:
    """The model whose blocks come nearest to a size, among those near the ladder's proportion.

    Widths are whole heads; a width that the family cannot have is passed over. A tenth off in proportion weighs as much
    as a hundredth off in size.

    Raises:
        ConfigError: No model of the family is small enough.
    """
    model = campaign.model
    depths = range(1 + (model.moe.dense_layers if model.moe else 0), MAX_LAYERS + 1)

    # The models of each width, up to the first whose shallowest is larger than wanted.
    widths: list[tuple[ModelConfig, DepthLine]] = []
    for heads in itertools.count(1):
        try:
            shape = _shape(model, layers=depths[0], width=table.head_size * heads, heads=heads)
            line = depth_line(shape)
        except UserError as error:  # the family refuses this number of heads, or every one
            if heads == MAX_LAYERS and not widths:
                raise ConfigError(f"[ladder]: no width up to {heads} heads makes a model: {error}") from None
            continue
        widths.append((shape, line))
        if line.shallowest > parameters:
            break

    def misfit(candidate: tuple[int, ModelConfig, DepthLine]) -> float:
        layers, shape, line = candidate
        proportion = math.log(shape.width / layers / table.width_per_layer)
        return abs(math.log(line.blocks(layers) / parameters)) + 0.1 * abs(proportion)

    # For every depth the widest model that is not too large, and the next wider one.
    candidates = []
    wider = len(widths)
    for layers in depths:
        while wider and widths[wider - 1][1].blocks(layers) > parameters:  # deeper models are narrower
            wider -= 1
        candidates += [(layers, shape, line) for shape, line in widths[max(0, wider - 1) : wider + 1]]
    layers, shape, _ = min(candidates, key=misfit)
    return msgspec.structs.replace(shape, layers=layers)
