"""Settings that tuning found, in the runs of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import ConfigError, UserError
from scaling.io import read_json
from scaling.optim.search_space import SearchRange
from scaling.spec import RunSpec
from sweeps.config.hyperparameter_rules import read_rule_file, rule
from sweeps.config.search_space import Dimension, Values, centred, known_searches, with_values
from sweeps.config.toml import located
from sweeps.config.tune import TuneConfig, search_hash
from sweeps.config.tuning_results import TrialResult, Tuning, facts_file
from sweeps.planning.ladder import rungs_of

if TYPE_CHECKING:
    from sweeps.config.campaign import Campaign
    from sweeps.planning.plan import PlannedRun
if TYPE_CHECKING:
    from sweeps.config.campaign import ArmConfig, Campaign
    from sweeps.planning.ladder import Rung


def with_settings(campaign: Campaign, root: Path) -> Campaign:
    """The campaign with what its tuning settled on, read from ``results/<campaign>/tuning.json``.

    One that was not tuned to the end with its present ``[tune]`` table takes the middle of every range and is marked
    `untuned`: it can be planned, and `refuse_untuned` keeps it from being trained. An arm whose rule is a file takes every hyper-parameter from there.
    """
    campaign = _with_rule_files(campaign)
    tuned = [arm.name for arm in campaign.arms if arm.tuned]
    if not campaign.untuned and all(arm in campaign.settings for arm in tuned):
        return campaign
    found = _found(campaign, root)
    if found is not None and found.settings:
        return msgspec.structs.replace(campaign, settings={**campaign.settings, **found.settings}, untuned=False)
    middle = middles(campaign, rungs_of(campaign))
    return msgspec.structs.replace(campaign, settings={**campaign.settings, **middle}, untuned=True)


def _found(campaign: Campaign, root: Path) -> Tuning | None:
    """tuning.json, where it is of the present ``[tune]`` table."""
    file = facts_file(root, campaign.name)
    if campaign.tune is None or not file.exists():
        return None
    found = read_json(file, Tuning, remedy=f"Move it aside and run: scaling tune {campaign.name}")
    return found if found.search in (None, search_hash(campaign.tune)) else None


def refuse_foreign(campaign: Campaign, root: Path, runs: Sequence[PlannedRun]) -> None:
    """Refuse settings that were searched for another model, other data or another training than the runs have.

    Each trial must be a run that this campaign would make with the trial's values, as ``scaling tune`` also asks.

    Args:
        campaign: With its settings.
        root: Folder with ``results/``.
        runs: The campaign's runs; their data must be prepared, for a run's id depends on the data.

    Raises:
        ConfigError: A trial is none of this campaign's.
    """
    found = _found(campaign, root)
    if found is None or any(campaign.settings.get(arm) != settings for arm, settings in found.settings.items()):
        return  # the settings come from elsewhere
    first = {(run.arm, run.rung): msgspec.structs.replace(run.spec, branch_of=None) for run in reversed(runs)}
    for study in found.studies:
        template = first.get((study.arm, study.rung))
        if template is None:
            continue
        for trial in study.trials:
            if not _makes(template, trial):
                raise ConfigError(
                    f"{facts_file(root, campaign.name)}: the settings of {study.arm} were searched with run {trial.run} "
                    f"at rung {study.rung}, which {campaign.file} as it is now does not make: its data, model or training "
                    "were changed since. Undo the change; or tune the changed campaign under another name "
                    f"(--set name={campaign.name}-2, for every verb), where finished runs are found again."
                )


def _makes(template: RunSpec, trial: TrialResult) -> bool:
    try:
        return with_values(template, trial.values).id == trial.run
    except UserError:  # a hyper-parameter that the optimizer no longer has
        return False


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


def untuned_note(campaign: Campaign) -> list[str]:
    """A sentence on settings that are still to be found; empty where there are none."""
    if not campaign.untuned:
        return []
    tuned = ", ".join(arm.name for arm in campaign.arms if arm.tuned)
    return [
        f"{campaign.file}: settings of {tuned} come from tuning, which is not done with [tune] as it is now; the plan "
        f"shows the middle of each range. Run: scaling tune {campaign.name}"
    ]


def refuse_untuned(campaign: Campaign) -> None:
    """Refuse to train arms whose settings are still to be found.

    Raises:
        ConfigError: The campaign has tuned arms and was not tuned to the end.
    """
    if note := untuned_note(campaign):
        raise ConfigError(*note)


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


def _ranging(row: SearchRange, low: float, high: float, *, where: str) -> SearchRange:
    """The row with another range, its limits moved where the range passes them.

    Raises:
        ConfigError: The range is not in order, or the row's scale cannot hold it.
    """
    with located(where):
        return msgspec.structs.replace(row, low=low, high=high, least=min(row.least, low), most=max(row.most, high))


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
            row = _ranging(row, wished.low, wished.high, where=f"{campaign.file}, [tune.search]")
        elif wished is not None and wished.values:
            values = wished.values
            _ranging(row, values[0], values[-1], where=f"{campaign.file}, [tune.search]")
        elif wished is not None and wished.rule is not None:
            law = getattr(rule(wished.rule), name)
            row = centred(row, law.at(compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens))
        found.append(Dimension(search=row, values=values))
    if not found:
        raise ConfigError(
            f'{campaign.file}, [tune.search]: names nothing that {arm.optimizer} of arm "{arm.name}" has.'
        )
    return tuple(found)
