"""Settings of tuned arms in a plan, and the search space and number of trials of each study. Imports no Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.io import read_json
from scaling.spec import RunSpec
from sweeps.config.hyperparameter_rules import read_rule_file, rule_set
from sweeps.config.search_space import Dimension, Values, centred, known_searches, with_values
from sweeps.config.tune import TuneConfig
from sweeps.config.tuning_results import Tuning, tuning_file
from sweeps.planning.ladder import rungs_of

if TYPE_CHECKING:
    from sweeps.config.campaign import ArmConfig, Campaign
    from sweeps.planning.ladder import Rung


def with_settings(campaign: Campaign, root: Path) -> Campaign:
    """The campaign with the settings found by tuning, read from ``results/<campaign>/tuning.json``.

    A campaign that is not tuned to the end gets the middle of every range and is marked `untuned`: it can be planned,
    and `refuse_untuned` keeps it from being trained. An arm whose rule is a file gets every hyper-parameter from there.
    """
    campaign = _with_rule_files(campaign)
    tuned = [arm.name for arm in campaign.arms if arm.tuned]
    if not campaign.untuned and all(arm in campaign.settings for arm in tuned):
        return campaign
    file = tuning_file(root, campaign.name)
    found = read_json(file, Tuning) if file.exists() else None
    if found is not None and found.settings:
        return msgspec.structs.replace(campaign, settings={**campaign.settings, **found.settings}, untuned=False)
    middle = middles(campaign, rungs_of(campaign))
    return msgspec.structs.replace(campaign, settings={**campaign.settings, **middle}, untuned=True)


def _with_rule_files(campaign: Campaign) -> Campaign:
    settings = dict(campaign.settings)
    for arm in campaign.arms:
        if arm.rule is not None and arm.rule.endswith(".toml") and arm.name not in settings:
            rules = read_rule_file(Path(arm.rule))
            settings[arm.name] = {
                rung.name: rules.setting(
                    optimizer=arm.optimizer,
                    context=rung.shape.context,
                    compute=rung.compute,
                    parameters=rung.parameters,
                    tokens=rung.tokens,
                )
                for rung in rungs_of(campaign)
            }
    return msgspec.structs.replace(campaign, settings=settings) if settings != campaign.settings else campaign


def refuse_untuned(campaign: Campaign) -> None:
    """Refuse to train a campaign whose tuning is not complete.

    Raises:
        ConfigError: The campaign has tuned arms and is not tuned to the end.
    """
    if campaign.untuned:
        tuned = ", ".join(arm.name for arm in campaign.arms if arm.tuned)
        raise ConfigError(
            f"{campaign.file}: settings of {tuned} come from tuning, which is not complete; the plan shows the "
            f"middle of each range. Run: scaling tune {campaign.name}"
        )


def settled(spec: RunSpec, campaign: Campaign, arm: str, rung: str) -> RunSpec:
    """The spec of a run with the settings of an arm at a rung; unchanged where the arm has none.

    Hyper-parameters that the run's optimizer lacks are left out. AdamW's betas become those of the AdamW beside Muon.

    Raises:
        ConfigError: The arm was tuned, but not for this rung.
    """
    by_rung = campaign.settings.get(arm)
    if by_rung is None:
        return spec
    if rung not in by_rung:
        raise ConfigError(f"tuning has no setting for this rung. Run again: scaling tune {campaign.name}")
    known = {"peak_lr", "weight_decay", "batch_tokens", "warmup", "final_fraction", *spec.optimizer.options}
    values = {}
    for name, value in by_rung[rung].items():
        own = name if name in known else f"adamw_{name}"
        if own in known:
            values[own] = value
    return with_values(spec, values)


def middles(campaign: Campaign, rungs: Sequence[Rung]) -> dict[str, dict[str, Values]]:
    """The middle of every range by arm and rung: the settings of a plan before tuning."""
    return {
        arm.name: {
            rung.name: {d.name: d.at(0.5, rung.shape.context) for d in dimensions_of(campaign, arm, rung)}
            for rung in rungs
        }
        for arm in campaign.arms
        if arm.tuned
    }


def tuned_rungs(campaign: Campaign, rungs: Sequence[Rung]) -> list[Rung]:
    """Rungs with studies, in the order of the campaign: those that ``[tune]`` names, or all.

    Raises:
        ConfigError: ``[tune]`` names a rung that the campaign does not have.
    """
    table = campaign.tune or TuneConfig()
    known = [rung.name for rung in rungs]
    for name in (*table.rungs, *table.held_out):
        if name not in known:
            raise ConfigError(f"{campaign.file}, [tune]: {unknown_name('rung', name, known)}")
    named = [*table.rungs, *table.held_out] if table.rungs else known
    return [rung for rung in rungs if rung.name in named]


def trials_of(table: TuneConfig, dimensions: Sequence[Dimension]) -> int:
    """Number of trials of one study: the points of a grid, else ``[tune] trials``."""
    return math.prod(len(d.values) for d in dimensions) if table.sampler == "grid" else table.trials


def dimensions_of(campaign: Campaign, arm: ArmConfig, rung: Rung) -> tuple[Dimension, ...]:
    """Search space of an arm at a rung: the optimizer's ranges, as ``[tune.search]`` changes them.

    Raises:
        ConfigError: A range is not in order, or nothing is left to search.
    """
    table = campaign.tune or TuneConfig()
    found = []
    for name, row in known_searches(arm.optimizer).items():
        search = table.search.get(name)
        if table.search and search is None:
            continue
        if name == "batch_tokens":
            # The optimizer's range is meant for large models; a factor of four around the campaign's own batch fits better.
            least, most = float(rung.shape.context), rung.tokens / 8
            low, high = max(rung.batch_tokens / 4, least), min(rung.batch_tokens * 4.0, most)
            row = msgspec.structs.replace(
                row, low=low, high=max(high, low * 1.01), least=least, most=max(most, low * 1.01)
            )
        if search is not None and search.low is not None and search.high is not None:
            least, most = min(row.least, search.low), max(row.most, search.high)
            row = msgspec.structs.replace(row, low=search.low, high=search.high, least=least, most=most)
        elif search is not None and search.rule is not None:
            row = centred(
                row,
                rule_set(search.rule).value(name, compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens),
            )
        found.append(Dimension(search=row, values=search.values if search is not None else ()))
    if not found:
        raise ConfigError(
            f"{campaign.file}, [tune.search]: no name is a hyper-parameter of {arm.optimizer}, the optimizer of arm "
            f'"{arm.name}". Known: {", ".join(known_searches(arm.optimizer))}.'
        )
    return tuple(found)
