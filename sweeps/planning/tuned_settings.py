"""From what tuning found to the runs of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import ConfigError
from scaling.io import read_json
from scaling.spec import RunSpec
from sweeps.config.hyperparameter_rules import read_rule_file, rule
from sweeps.config.search_space import Dimension, Values, centred, known_searches, with_values
from sweeps.config.tune import TuneConfig
from sweeps.config.tuning_results import Tuning, facts_file
from sweeps.planning.ladder import rungs_of

if TYPE_CHECKING:
    from sweeps.config.campaign import Campaign
if TYPE_CHECKING:
    from sweeps.config.campaign import ArmConfig, Campaign
    from sweeps.planning.ladder import Rung


def with_settings(campaign: Campaign, root: Path) -> Campaign:
    """The campaign with what its tuning settled on, read from ``results/<campaign>/tuning.json``.

    One that was not tuned to the end takes the middle of every range and is marked `untuned`: it can be planned, and
    `refuse_untuned` keeps it from being trained. An arm whose rule is a file takes every hyper-parameter from there.
    """
    campaign = _with_rule_files(campaign)
    tuned = [arm.name for arm in campaign.arms if arm.tuned]
    if not campaign.untuned and all(arm in campaign.settings for arm in tuned):
        return campaign
    file = facts_file(root, campaign.name)
    found = read_json(file, Tuning) if file.exists() else None
    if found is not None and found.settings:
        return msgspec.structs.replace(campaign, settings={**campaign.settings, **found.settings}, untuned=False)
    middle = middles(campaign, rungs_of(campaign))
    return msgspec.structs.replace(campaign, settings={**campaign.settings, **middle}, untuned=True)


def _with_rule_files(campaign: Campaign) -> Campaign:
    settings = dict(campaign.settings)
    for arm in campaign.arms:
        if arm.rule is not None and arm.rule.endswith(".toml") and arm.name not in settings:
            file = read_rule_file(Path(arm.rule))
            settings[arm.name] = {
                rung.name: file.values(rung.compute, optimizer=arm.optimizer, context=rung.shape.context)
                for rung in rungs_of(campaign)
            }
    return msgspec.structs.replace(campaign, settings=settings) if settings != campaign.settings else campaign


def refuse_untuned(campaign: Campaign) -> None:
    """Refuse to train arms whose settings are still to be found.

    Raises:
        ConfigError: The campaign has tuned arms and was not tuned to the end.
    """
    if campaign.untuned:
        tuned = ", ".join(arm.name for arm in campaign.arms if arm.tuned)
        raise ConfigError(
            f"{campaign.file}: settings of {tuned} come from tuning, which is not done; the plan shows the "
            f"middle of each range. Run: scaling tune {campaign.name}"
        )


def settled(spec: RunSpec, campaign: Campaign, arm: str, rung: str) -> RunSpec:
    """The spec of a run with the settings of an arm at a rung; a spec of an arm without any comes back as it is.

    What another optimizer lacks is left out. AdamW's own betas become those of the AdamW beside Muon.

    Raises:
        ConfigError: The arm was tuned, and not for this rung.
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
    """The middle of every range by arm and rung: what a plan shows before anything was tuned."""
    return {
        arm.name: {
            rung.name: {d.name: d.at(0.5, rung.shape.context) for d in dimensions_of(campaign, arm, rung)}
            for rung in rungs
        }
        for arm in campaign.arms
        if arm.tuned
    }


def dimensions_of(campaign: Campaign, arm: ArmConfig, rung: Rung) -> tuple[Dimension, ...]:
    """What is searched for an arm at a rung: the optimizer's rows, with what ``[tune.search]`` says instead.

    Raises:
        ConfigError: A range is not in order, or nothing is left to search.
    """
    table = campaign.tune or TuneConfig()
    rows = known_searches(arm.optimizer)
    found = []
    for name, row in rows.items():
        wished = table.search.get(name)
        if table.search and wished is None:
            continue
        if name == "batch_tokens":
            # The row's range is for large models; the campaign's own batch says more.
            least, most = float(rung.shape.context), rung.tokens / 8
            low, high = max(rung.batch_tokens / 4, least), min(rung.batch_tokens * 4.0, most)
            row = msgspec.structs.replace(
                row, low=low, high=max(high, low * 1.01), least=least, most=max(most, low * 1.01)
            )
        values: tuple[float, ...] = ()
        if wished is not None and wished.low is not None and wished.high is not None:
            least, most = min(row.least, wished.low), max(row.most, wished.high)
            row = msgspec.structs.replace(row, low=wished.low, high=wished.high, least=least, most=most)
        elif wished is not None and wished.values:
            values = wished.values
        elif wished is not None and wished.rule is not None:
            law = getattr(rule(wished.rule), name)
            row = centred(row, law.at(compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens))
        found.append(Dimension(search=row, values=values))
    if not found:
        raise ConfigError(
            f'{campaign.file}, [tune.search]: names nothing that {arm.optimizer} of arm "{arm.name}" has.'
        )
    return tuple(found)
