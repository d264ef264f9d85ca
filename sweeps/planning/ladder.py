"""The rungs of a campaign: model sizes with their budgets, as listed, by a compute-optimal rule, or as isoFLOP profiles.

Everything here is a pure function of the campaign.
"""

from __future__ import annotations

import itertools
import math

import msgspec

from scaling.errors import ConfigError, UserError
from scaling.flops import DepthLine, count_parameters, depth_line, train_flops_per_token
from scaling.model_config import ModelConfig
from scaling.units import human
from sweeps.config.campaign import ArmConfig, Campaign, LadderConfig, RungConfig, SharedModelConfig
from sweeps.config.hyperparameter_rules import HyperparameterRule, rule
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
    """Training FLOPs (6ND) that laws are asked about: a law's own where the law sets the tokens."""
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


def peak_lr(campaign: Campaign, arm: ArmConfig, rung: Rung) -> float:
    """The peak learning rate of an arm at a rung: the arm's own, the rung's, the campaign's, or a law's.

    Raises:
        ConfigError: It is said nowhere, or the rule has no law for it.
    """
    settled = campaign.settings.get(arm.reuse or arm.name, {}).get(rung.name, {}).get("peak_lr")
    if settled is not None:
        return settled
    name = arm.rule or (campaign.law if campaign.hyperparameters == "law" else None)
    if name is not None:
        law = rule(name)
        if law.peak_lr is None:
            raise ConfigError(
                f'rule "{name}" ({law.label}) says nothing about learning rates. Use another, or list peak_lr.'
            )
        return law.peak_lr.at(compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens)
    own = arm.peak_lr.get(rung.name) if isinstance(arm.peak_lr, dict) else arm.peak_lr
    for rate in (own, rung.peak_lr, campaign.training.peak_lr):
        if rate is not None:
            return rate
    raise ConfigError("no peak_lr is given. Put one into the arm, the rung or [training], or name a rule in the arm.")


def _listed(campaign: Campaign, table: RungConfig) -> Rung:
    where = f'{campaign.file}, rung "{table.name}"'
    model, training = campaign.model, campaign.training
    with located(where):
        shape = _shape(model, layers=table.layers, width=table.width, heads=table.heads, ffn=table.ffn)
        if table.tokens is not None and table.tokens_per_parameter is not None:
            raise ConfigError("has both tokens and tokens_per_parameter. Keep one of them.")
    parameters = count_parameters(shape).blocks
    law = rule(campaign.law) if campaign.hyperparameters == "law" and campaign.law else None
    ratio = table.tokens_per_parameter or (training.tokens_per_parameter if table.tokens is None else None)
    tokens = table.tokens if ratio is None else round(ratio * parameters)
    compute = None
    if law is not None and law.parameters is not None and law.tokens is not None:
        compute = law.compute_for(parameters)
        tokens = round(law.optimal_tokens(compute))
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
        batch_tokens=_batch(where, law, table.batch_tokens or training.batch_tokens, shape, compute, tokens),
        peak_lr=table.peak_lr,
        seeds=campaign.seeds if table.seeds is None else table.seeds,
        compute=compute,
        printed=table.printed,
    )


def _batch(
    where: str, law: HyperparameterRule | None, listed: int | None, shape: ModelConfig, compute: float, tokens: int
) -> int:
    if law is not None and law.batch_tokens is not None:
        parameters = count_parameters(shape).blocks
        wanted = law.batch_tokens.at(compute=compute, parameters=parameters, tokens=tokens)
        return max(1, round(wanted / shape.context)) * shape.context
    if listed is None:
        raise ConfigError(f"{where}: no batch_tokens is given. Put it into the rung or into [training].")
    return listed


def _laddered(campaign: Campaign, table: LadderConfig) -> list[Rung]:
    where = f"{campaign.file}, [ladder]"
    if bool(table.computes) == bool(table.sizes):
        found = "both computes and sizes" if table.sizes else "neither computes nor sizes"
        raise ConfigError(f"{where}: {found}. Give one of them: computes in FLOPs, or sizes in parameters.")
    split = rule(table.rule)
    law = rule(campaign.law) if campaign.hyperparameters == "law" and campaign.law else None
    made: list[Rung] = []
    with located(where):
        if table.kind == "isoflop":
            if table.sizes:
                raise ConfigError("an isoFLOP profile is made at a compute. Replace sizes by computes, in FLOPs.")
            for compute in sorted(table.computes):
                centre = split.optimal_parameters(compute)
                steps = [2 * point / (table.points - 1) - 1 for point in range(table.points)]
                shapes = {shape_near(centre * table.spread**step, campaign, table) for step in steps}
                if len(shapes) < 3:
                    raise ConfigError(
                        f"the profile at {compute:g} FLOPs has only {len(shapes)} different models around "
                        f"{human(centre)} parameters. Use a wider spread, a smaller head_size, or more compute."
                    )
                made += [_made(campaign, law, shape, compute) for shape in sorted(shapes, key=_blocks)]
        elif table.computes:
            for compute in sorted(table.computes):
                made.append(
                    _made(campaign, law, shape_near(split.optimal_parameters(compute), campaign, table), compute)
                )
        else:
            for size in sorted(table.sizes):
                shape = shape_near(size, campaign, table)
                compute = split.compute_for(_blocks(shape))
                made.append(_made(campaign, law, shape, compute, tokens=round(split.optimal_tokens(compute))))
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
    campaign: Campaign, law: HyperparameterRule | None, shape: ModelConfig, compute: float, *, tokens: int | None = None
) -> Rung:
    name = human(_blocks(shape))
    if campaign.ladder is not None and campaign.ladder.kind == "isoflop":
        name = f"{compute:.1e}-{name}".replace("+", "")
    tokens = tokens or max(1, round(compute / train_flops_per_token(shape)))
    return Rung(
        name=name,
        shape=shape,
        tokens=tokens,
        batch_tokens=_batch(f'rung "{name}"', law, campaign.training.batch_tokens, shape, compute, tokens),
        peak_lr=None,
        seeds=campaign.seeds,
        compute=compute,
    )


def _shape(model: SharedModelConfig, *, layers: int, width: int, heads: int, ffn: int | None = None) -> ModelConfig:
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=model.vocabulary,
        context=model.context,
        ffn_multiple=model.ffn_multiple,
        tied=model.tied,
        family=model.family,
        ffn=ffn,
        moe=model.moe,
        mla=model.mla,
        family_options=model.family_options,
    )


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
