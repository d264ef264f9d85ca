"""Settings of tuned arms in a plan, and the search space and number of trials of each study. Imports no Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import ConfigError, UserError, unknown_name
from scaling.io import read_json
from scaling.spec import RunSpec
from sweeps.config.hyperparameter_rules import read_rule_file, rule_set
from sweeps.config.search_space import Dimension, Values, centred, known_searches, with_values
from sweeps.config.toml import located
from sweeps.config.tune import SearchConfig, TuneConfig, search_hash
from sweeps.config.tuning_results import TrialResult, Tuning, tuning_file
from sweeps.planning.ladder import rungs_of

if TYPE_CHECKING:
    from sweeps.config.campaign import ArmConfig, Campaign
    from sweeps.planning.ladder import Rung
    from sweeps.planning.plan import PlannedRun


def with_settings(campaign: Campaign, root: Path) -> Campaign:
    """The campaign with the settings found by tuning, read from ``results/<campaign>/tuning.json``.

    A campaign that is not tuned to the end with its present ``[tune]`` table gets the middle of every range and is
    marked `untuned`: it can be planned, and `refuse_untuned` keeps it from being trained. An arm whose rule is a file
    gets every hyper-parameter from there.
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
    """The campaign's tuning.json; None if there is none, or it was written for another ``[tune]`` table."""
    file = tuning_file(root, campaign.name)
    if campaign.tune is None or not file.exists():
        return None
    found = read_json(file, Tuning, remedy=f"Move it aside and run: scaling tune {campaign.name}")
    return found if found.search in (None, search_hash(campaign.tune)) else None


def refuse_foreign(campaign: Campaign, root: Path, runs: Sequence[PlannedRun]) -> None:
    """Refuse settings that were searched for another model, other data or another training than the runs have.

    Each trial must be a run that this campaign makes with the trial's values; ``scaling tune`` checks the same. The data
    of the runs must be prepared, for a run's id depends on the data.

    Raises:
        ConfigError: A trial belongs to another campaign.
    """
    found = _found(campaign, root)
    if found is None or any(campaign.settings.get(arm) != settings for arm, settings in found.settings.items()):
        return  # the settings come from elsewhere
    first = {(run.arm, run.rung): msgspec.structs.replace(run.spec, branch_of=None) for run in reversed(runs)}
    for study in found.studies:
        template = first.get((study.arm, study.rung))
        for trial in study.trials:
            if template is not None and not _makes(template, trial):
                raise ConfigError(
                    f"{tuning_file(root, campaign.name)}: the settings of {study.arm} were searched with run {trial.run} "
                    f"at rung {study.rung}, which the present {campaign.file} does not make: its data, model or training "
                    "changed since then. Undo the change; or tune the changed campaign under another name "
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


def untuned_note(campaign: Campaign) -> list[str]:
    """A sentence on arms whose tuning is not complete; empty if there are none."""
    if not campaign.untuned:
        return []
    tuned = ", ".join(arm.name for arm in campaign.arms if arm.tuned)
    return [
        f"{campaign.file}: settings of {tuned} come from tuning, which is not complete for the present [tune] table; the plan "
        f"shows the middle of each range. Run: scaling tune {campaign.name}"
    ]


def refuse_untuned(campaign: Campaign) -> None:
    """Raise a ConfigError if the tuning of a campaign is not complete."""
    if note := untuned_note(campaign):
        raise ConfigError(*note)


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
    own = {name if name in known else f"adamw_{name}": value for name, value in by_rung[rung].items()}
    return with_values(spec, {name: value for name, value in own.items() if name in known})


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
    """Rungs with studies, in the order of the campaign: those that ``[tune]`` names, or all."""
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
    """Search space of an arm at a rung: the optimizer's ranges, as ``[tune.search]`` changes them."""
    table = campaign.tune or TuneConfig()
    found = []
    for name, row in known_searches(arm.optimizer).items():
        if table.search and name not in table.search:
            continue
        search = table.search.get(name, SearchConfig())
        if name == "batch_tokens":
            # The optimizer's range is meant for large models; a factor of four around the campaign's own batch fits better.
            least, most = float(rung.shape.context), rung.tokens / 8
            low, high = max(rung.batch_tokens / 4, least), min(rung.batch_tokens * 4.0, most)
            floor = low * 1.01
            row = msgspec.structs.replace(row, low=low, high=max(high, floor), least=least, most=max(most, floor))
        here = f"{campaign.file}, [tune.search.{name}]"
        ends = search.values or (search.low, search.high)
        bottom, top = ends[0], ends[-1]
        if bottom is not None and top is not None:
            with located(here):  # listed values are checked as a range of the row's scale
                least, most = min(row.least, bottom), max(row.most, top)
                ranged = msgspec.structs.replace(row, low=bottom, high=top, least=least, most=most)
            row = row if search.values else ranged
        elif search.rule is not None:
            with located(here):
                centre = rule_set(search.rule).value(
                    name, compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens
                )
            row = centred(row, centre)
        found.append(Dimension(search=row, values=search.values))
    if not found:
        raise ConfigError(
            f"{campaign.file}, [tune.search]: no name is a hyper-parameter of {arm.optimizer}, the optimizer of arm "
            f'"{arm.name}". Known: {", ".join(known_searches(arm.optimizer))}.'
        )
    return tuple(found)
