"""The ``[tune]`` table of a campaign: search space, rungs, number of trials, and transfer to the other rungs.

    [tune]
    trials = 12                # of every tuned arm at every tuned rung: arms have equal budgets by construction
    rungs = ["14k", "25k"]     # rungs that the hyper-parameter rules are fitted to
    held_out = ["38k"]         # tuned, but left out of the fit: tests the transfer

    [tune.search.peak_lr]      # starts from the optimizer's own range unless low and high are given
    [tune.search.batch_tokens]
    values = [1_024, 2_048]    # tries the listed values only

An arm with ``tuned = true`` takes its settings from its own studies, an arm with ``reuse = "adamw"`` those of that arm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.io import Finite, Seed, Strict
from sweeps.config.hyperparameter_rules import rule_set
from sweeps.config.search_space import known_searches

if TYPE_CHECKING:
    from sweeps.config.campaign import ArmConfig, Campaign


Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Trials = Annotated[int, msgspec.Meta(gt=0, le=10_000)]


class SearchConfig(Strict, frozen=True):
    """``[tune.search.NAME]``: initial range of one hyper-parameter, in place of the optimizer's own."""

    low: Finite | None = None
    high: Finite | None = None
    values: Annotated[tuple[Finite, ...], msgspec.Meta(max_length=1000)] = ()
    """The only values to try; required by a grid."""
    rule: str | None = None
    """Row of RULES, or rule file, whose prediction at each rung is the centre of the range."""


class HalvingConfig(Strict, frozen=True):
    """``[tune.halving]``: every setting is first trained on a smaller budget; the better ones get a full run.

    The shorter runs complete a schedule of their own, so no loss is read in the middle of a schedule.
    """

    share: Share = 0.25
    """Budget of the first run as a share of the rung's tokens."""
    keep: Share = 0.5
    """Share of a generation's trials that get a full run."""


class TuneConfig(Strict, frozen=True):
    """``[tune]``."""

    sampler: Literal["tpe", "gp", "quasi-random", "grid"] = "tpe"
    trials: Trials = 16
    """Trials of every tuned arm at every tuned rung. A grid has one for each of its points."""
    startup: Trials = 6
    """Quasi-random trials before the sampler is used."""
    in_flight: Trials = 4
    """Trials of one generation, which are proposed together."""
    rungs: tuple[str, ...] = ()
    """Rungs that rules are fitted to; all of them if empty."""
    held_out: tuple[str, ...] = ()
    seed: Seed = 0
    widen: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    """Times that the range of one hyper-parameter may grow at an edge, within the same number of trials."""
    transfer: Literal["power", "constant"] = "power"
    """Settings of rungs that are not tuned: powers of C fitted to the tuned rungs, or constants."""
    halving: HalvingConfig | None = None
    search: dict[str, SearchConfig] = msgspec.field(default_factory=dict)
    """By hyper-parameter; all of the optimizer's own if empty."""


def check(campaign: Campaign) -> None:
    """Check ``[tune]`` against the arms of its campaign; raises a ConfigError with file, table, field and remedy."""
    table, where = campaign.tune, f"{campaign.file}, [tune]"
    tuned = [arm for arm in campaign.arms if arm.tuned]
    _check_arms(campaign, tuned)
    if table is None:
        return
    if not tuned:
        raise ConfigError(f"{where}: no arm is tuned. Write tuned = true into the [[arms]] that it is meant for.")
    for name in {*table.rungs} & {*table.held_out}:
        raise ConfigError(
            f'{where}: rung "{name}" is in rungs and in held_out. Keep it in one: a held-out rung tests the rules.'
        )
    known = {name for arm in tuned for name in known_searches(arm.optimizer)}
    for name, search in table.search.items():
        if name not in known:
            raise ConfigError(f"{where}: {unknown_name('hyper-parameter', name, known)}")
        here = f"{campaign.file}, [tune.search.{name}]"
        _check_search(here, name, search)
        if table.sampler == "grid" and not search.values:
            raise ConfigError(f"{here}: a grid needs listed values. Add: values = [...]")
    if table.sampler == "grid" and not table.search:
        raise ConfigError(f"{where}: a grid needs hyper-parameters. Add [tune.search.peak_lr] with values.")
    if table.sampler == "grid" and table.halving:
        raise ConfigError(f"{where}: a grid is always trained in full. Remove [tune.halving], or use another sampler.")
    if table.halving is not None and table.in_flight < 2:
        raise ConfigError(
            f"{where}: in_flight is {table.in_flight}, and halving compares the trials of a generation. Set 2 or more."
        )


def search_hash(table: TuneConfig) -> str:
    """Hash of a ``[tune]`` table, defaults included: settings are valid only for the search that found them."""
    return hashlib.sha256(msgspec.json.encode(table, order="sorted")).hexdigest()[:12]


def _check_arms(campaign: Campaign, tuned: Sequence[ArmConfig]) -> None:
    names = [arm.name for arm in campaign.arms]
    settled = {arm.name for arm in campaign.arms if not arm.tuned and arm.reuse is None}
    for arm in campaign.arms:
        here = f'{campaign.file}, [[arms]] "{arm.name}"'
        if arm.reuse is not None:
            if arm.tuned:
                raise ConfigError(f"{here}: has both tuned and reuse. Keep one of them.")
            if arm.reuse not in names:
                raise ConfigError(f"{here}, reuse: {unknown_name('arm', arm.reuse, names)}")
            if arm.reuse not in [other.name for other in tuned]:
                raise ConfigError(f'{here}: reuses "{arm.reuse}", which is not tuned. Write tuned = true there.')
        if arm.tuned and campaign.tune is None:
            raise ConfigError(f"{here}: has tuned = true, and there is no [tune] table. Add one.")
        if arm.tuned and arm.warm_start is not None and arm.warm_start.arm not in settled:
            raise ConfigError(
                f'{here}: is tuned and starts from "{arm.warm_start.arm}", whose settings the same studies decide. '
                "Tune that arm in a campaign of its own and write its settings here."
            )


def _check_search(here: str, name: str, search: SearchConfig) -> None:
    given = [search.low is not None or search.high is not None, bool(search.values), search.rule is not None]
    if sum(given) > 1:
        raise ConfigError(f"{here}: has two of low and high, values, rule. Keep one of the three.")
    if (search.low is None) != (search.high is None):
        raise ConfigError(f"{here}: low and high come together. Add the other one.")
    if search.values and (len(search.values) < 2 or list(search.values) != sorted(set(search.values))):
        raise ConfigError(f"{here}: values are {list(search.values)}. List two or more in rising order.")
    if search.rule is not None and name not in rule_set(search.rule).rules:
        raise ConfigError(f'{here}: rule "{search.rule}" has no rule for {name}. Give low and high instead.')
