"""From what tuning found to the runs of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import Refusal
from scaling.records import read_json
from scaling.spec import RunSpec
from sweeps.tuning.facts import Tuning, facts_file
from sweeps.tuning.space import with_values

if TYPE_CHECKING:
    from sweeps.campaign import Campaign


def with_settings(campaign: Campaign, root: Path) -> Campaign:
    """The campaign with what its tuning settled on, read from ``results/<campaign>/tuning.json``.

    A campaign without tuned arms, or one that has settings already, comes back as it is.

    Raises:
        Refusal: It has tuned arms and was not tuned to the end.
    """
    if campaign.settings or not any(arm.tuned for arm in campaign.arms):
        return campaign
    file = facts_file(root, campaign.name)
    found = read_json(file, Tuning) if file.exists() else None
    if found is None or not found.settings:
        tuned = ", ".join(arm.name for arm in campaign.arms if arm.tuned)
        raise Refusal(
            f"{campaign.file}: {tuned} takes its settings from tuning, and {file} "
            f"{'says that it is not finished' if found else 'is not there'}. Run: scaling tune {campaign.name}"
        )
    return msgspec.structs.replace(campaign, settings=found.settings)


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
