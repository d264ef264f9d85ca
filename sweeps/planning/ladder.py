"""The rungs of a campaign: model sizes with their budgets, as listed, by a compute-optimal rule, or as isoFLOP profiles.

Everything here is a pure function of the campaign.
"""

from __future__ import annotations

import math

import msgspec

from scaling.errors import ConfigError
from scaling.flops import count_parameters, train_flops_per_token
from scaling.spec import ModelConfig, ffn_width
from scaling.units import human
from sweeps.config.campaign import ArmConfig, Campaign, LadderConfig, RungConfig
from sweeps.config.hyperparameter_rules import RuleSet, rule_set
from sweeps.config.toml import located


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One model size with its budget, every number decided."""

    name: str
    shape: ModelConfig
    tokens: int
    batch_tokens: int
    peak_lr: float | None
    """Shared by the arms that state none of their own."""
    seeds: tuple[int, ...]
    compute: float
    """Training FLOPs (6ND) at which rules are evaluated; given by the rule itself where a rule sets the tokens."""
    printed: dict[str, str] = {}

    @property
    def parameters(self) -> int:
        """Weights of the blocks: the papers' N."""
        return count_parameters(self.shape).blocks


def rungs_of(campaign: Campaign) -> list[Rung]:
    """All rungs, in the order of the file or of rising compute.

    Raises:
        ConfigError: A shape is impossible, or tokens or batch are said nowhere; the sentence names the rung.
    """
    if campaign.ladder is not None:
        return _laddered(campaign, campaign.ladder)
    return [_listed(campaign, table) for table in campaign.rungs]


WIDENED = 1.25
"""Hidden units of a feed-forward over 8/3 of the width from which the plan mentions the rounding."""


def widened(rungs: list[Rung]) -> str | None:
    """A sentence on the rungs whose feed-forward `ffn_multiple` makes much wider than 8/3 of the width."""
    found = {
        f"{rung.name} ({8 * rung.shape.width / 3:.0f} to {rung.shape.ffn_width:,})": rung.shape
        for rung in rungs
        if rung.shape.ffn is None and rung.shape.ffn_width > WIDENED * 8 * rung.shape.width / 3
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
    where = f'{campaign.file}, rung "{table.name}"'
    model, training = campaign.model, campaign.training
    with located(where):
        shape = ModelConfig(
            layers=table.layers,
            width=table.width,
            heads=table.heads,
            vocabulary=model.vocabulary,
            context=model.context,
            ffn_multiple=model.ffn_multiple,
            tied=model.tied,
            family=model.family,
            ffn=table.ffn,
            moe=model.moe,
            mla=model.mla,
        )
        if table.tokens is not None and table.tokens_per_parameter is not None:
            raise ConfigError("has both tokens and tokens_per_parameter. Keep one of them.")
    parameters = count_parameters(shape).blocks
    rules = rule_set(campaign.rule) if campaign.hyperparameters == "rule" and campaign.rule else None
    ratio = table.tokens_per_parameter or (training.tokens_per_parameter if table.tokens is None else None)
    tokens = table.tokens if ratio is None else round(ratio * parameters)
    compute = None
    if rules is not None and {"parameters", "tokens"} <= rules.rules.keys():
        compute = rules.compute_for(parameters)
        tokens = round(rules.value("tokens", compute=compute))
    if tokens is None:
        raise ConfigError(
            f"{where}: it is not said how many tokens to train on. "
            "Give the rung tokens or tokens_per_parameter, or give [training] tokens_per_parameter."
        )
    compute = compute or float(train_flops_per_token(shape) * tokens)
    return Rung(
        name=table.name,
        shape=shape,
        tokens=tokens,
        batch_tokens=_batch(where, rules, table.batch_tokens or training.batch_tokens, shape, compute, tokens),
        peak_lr=table.peak_lr,
        seeds=campaign.seeds if table.seeds is None else table.seeds,
        compute=compute,
        printed=table.printed,
    )


def _batch(
    where: str, rules: RuleSet | None, listed: int | None, shape: ModelConfig, compute: float, tokens: int
) -> int:
    if rules is not None and "batch_tokens" in rules.rules:
        parameters = count_parameters(shape).blocks
        wanted = rules.value("batch_tokens", compute=compute, parameters=parameters, tokens=tokens)
        return max(1, round(wanted / shape.context)) * shape.context
    if listed is None:
        raise ConfigError(f"{where}: no batch_tokens is given. Put it into the rung or into [training].")
    return listed


def _laddered(campaign: Campaign, table: LadderConfig) -> list[Rung]:
    where = f"{campaign.file}, [ladder]"
    if bool(table.computes) == bool(table.sizes):
        found = "both computes and sizes" if table.sizes else "neither computes nor sizes"
        raise ConfigError(f"{where}: {found}. Give one of them: computes in FLOPs, or sizes in parameters.")
    split = rule_set(table.rule)
    rules = rule_set(campaign.rule) if campaign.hyperparameters == "rule" and campaign.rule else None
    made: list[Rung] = []
    with located(where):
        if table.kind == "isoflop":
            if table.sizes:
                raise ConfigError("an isoFLOP profile is made at a compute. Replace sizes by computes, in FLOPs.")
            for compute in sorted(table.computes):
                centre = split.value("parameters", compute=compute)
                steps = [2 * point / (table.points - 1) - 1 for point in range(table.points)]
                shapes = {shape_near(centre * table.spread**step, campaign, table) for step in steps}
                if len(shapes) < 3:
                    raise ConfigError(
                        f"the profile at {compute:g} FLOPs has only {len(shapes)} different models around "
                        f"{human(centre)} parameters. Use a wider spread, a smaller head_size, or more compute."
                    )
                made += [_made(campaign, rules, shape, compute) for shape in sorted(shapes, key=_blocks)]
        elif table.computes:
            for compute in sorted(table.computes):
                made.append(
                    _made(
                        campaign,
                        rules,
                        shape_near(split.value("parameters", compute=compute), campaign, table),
                        compute,
                    )
                )
        else:
            for size in sorted(table.sizes):
                shape = shape_near(size, campaign, table)
                compute = split.compute_for(_blocks(shape))
                made.append(
                    _made(campaign, rules, shape, compute, tokens=round(split.value("tokens", compute=compute)))
                )
        names = [rung.name for rung in made]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"two rungs become the same model, {', '.join(twice)}. "
                "Put the sizes further apart, or make head_size smaller."
            )
    return made


def _blocks(shape: ModelConfig) -> int:
    return count_parameters(shape).blocks


def _made(
    campaign: Campaign, rules: RuleSet | None, shape: ModelConfig, compute: float, *, tokens: int | None = None
) -> Rung:
    name = human(_blocks(shape))
    if campaign.ladder is not None and campaign.ladder.kind == "isoflop":
        name = f"{compute:.1e}-{name}".replace("+", "")
    tokens = tokens or max(1, round(compute / train_flops_per_token(shape)))
    return Rung(
        name=name,
        shape=shape,
        tokens=tokens,
        batch_tokens=_batch(f'rung "{name}"', rules, campaign.training.batch_tokens, shape, compute, tokens),
        peak_lr=None,
        seeds=campaign.seeds,
        compute=compute,
    )


def shape_near(parameters: float, campaign: Campaign, table: LadderConfig) -> ModelConfig:
    """The model whose blocks come nearest to a size, among those near the ladder's proportion.

    Widths are whole heads. A tenth off in proportion weighs as much as a hundredth off in size.
    """
    model = campaign.model

    def size(layers: int, width: int) -> int:
        return layers * (4 * width**2 + 3 * width * ffn_width(width, model.ffn_multiple))

    def misfit(candidate: tuple[int, int]) -> float:
        layers, width = candidate
        proportion = math.log(width / layers / table.width_per_layer)
        return abs(math.log(size(layers, width) / parameters)) + 0.1 * abs(proportion)

    # 12 * layers * width**2 is the usual estimate, and it brackets the width for every depth.
    candidates = []
    for layers in range(1, 201):
        heads = math.sqrt(parameters / (12 * layers)) / table.head_size
        candidates += [(layers, table.head_size * n) for n in {max(1, math.floor(heads)), max(1, math.ceil(heads))}]
    layers, width = min(candidates, key=misfit)
    return ModelConfig(
        layers=layers,
        width=width,
        heads=width // table.head_size,
        vocabulary=model.vocabulary,
        context=model.context,
        ffn_multiple=model.ffn_multiple,
        tied=model.tied,
        family=model.family,
        moe=model.moe,
        mla=model.mla,
    )
