"""From what tuning found to the runs of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import Refusal
from scaling.records import read_json
from scaling.spec import RunSpec
from sweeps.ladder import rungs_of
from sweeps.tuning.facts import Tuning, facts_file
from sweeps.tuning.ranges import middles
from sweeps.tuning.rulefile import read_rule_file
from sweeps.tuning.space import with_values

if TYPE_CHECKING:
    from sweeps.campaign import Campaign


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
    remedy = f"Move it aside and run: scaling tune {campaign.name}"
    found = read_json(file, Tuning, remedy=remedy) if file.exists() else None
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
        Refusal: The campaign has tuned arms and was not tuned to the end.
    """
    if campaign.untuned:
        tuned = ", ".join(arm.name for arm in campaign.arms if arm.tuned)
        raise Refusal(
            f"{campaign.file}: settings of {tuned} come from tuning, which is not done; the plan shows the "
            f"middle of each range. Run: scaling tune {campaign.name}"
        )


def settled(spec: RunSpec, campaign: Campaign, arm: str, rung: str) -> RunSpec:
    """The spec of a run with the settings of an arm at a rung; a spec of an arm without any comes back as it is.

    What another optimizer lacks is left out. AdamW's own betas become those of the AdamW beside Muon.

    Raises:
        Refusal: The arm was tuned, and not for this rung.
    """
    by_rung = campaign.settings.get(arm)
    if by_rung is None:
        return spec
    if rung not in by_rung:
        raise Refusal(f"tuning has no setting for this rung. Run again: scaling tune {campaign.name}")
    known = {"peak_lr", "weight_decay", "batch_tokens", "warmup", "final_fraction", *spec.optimizer.options}
    values = {}
    for name, value in by_rung[rung].items():
        own = name if name in known else f"adamw_{name}"
        if own in known:
            values[own] = value
    return with_values(spec, values)
