"""The ``[tune]`` table of a campaign: what is searched, where, with how many trials, and how it is carried over.

    [tune]
    trials = 12                # of every tuned arm at every rung named here: equal budgets by construction
    rungs = ["14k", "25k"]     # the law is fitted to these
    held_out = ["38k"]         # tuned as well, kept out of the law: tests the transfer

    [tune.search.peak_lr]      # the optimizer's own row says where to begin, unless low and high do
    [tune.search.batch_tokens]
    values = [1_024, 2_048]    # or only listed values

An arm with ``tuned = true`` takes its settings from its studies; one with ``reuse = "adamw"`` those of that arm.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.io import Finite, Seed, Strict
from sweeps.config.hyperparameter_rules import rule
from sweeps.config.search_space import known_searches

if TYPE_CHECKING:
    from sweeps.config.campaign import Campaign


Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Trials = Annotated[int, msgspec.Meta(gt=0, le=10_000)]


class SearchConfig(Strict, frozen=True):
    """``[tune.search.NAME]``: where the search of one hyper-parameter begins, if not where its own row says."""

    low: Finite | None = None
    high: Finite | None = None
    values: Annotated[tuple[Finite, ...], msgspec.Meta(max_length=1000)] = ()
    """Only these are tried; a grid needs them."""
    rule: str | None = None
    """Row of RULES, or a rule file, that the range is centred on at each rung; peak_lr and batch_tokens have such."""


class HalvingConfig(Strict, frozen=True):
    """``[tune.halving]``: every setting first gets a whole run of a smaller budget; the better ones get a full one.

    The small runs complete a schedule of their own, so no loss is read in the middle of one.
    """

    share: Share = 0.25
    """Of the rung's tokens, for the first run."""
    keep: Share = 0.5
    """Of the trials asked together, those that go on."""


class TuneConfig(Strict, frozen=True):
    """``[tune]``."""

    sampler: Literal["tpe", "gp", "quasi-random", "grid"] = "tpe"
    trials: Trials = 16
    """Of every tuned arm at every rung. A grid has as many as it has points."""
    startup: Trials = 6
    """Quasi-random trials at the beginning."""
    in_flight: Trials = 4
    """Trials of one study that are asked together."""
    rungs: tuple[str, ...] = ()
    """Rungs that are tuned for the law; all of them when none is named."""
    held_out: tuple[str, ...] = ()
    seed: Seed = 0
    widen: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    """Times that the range of one hyper-parameter may grow at an edge; it takes no further trials."""
    law: Literal["compute", "constant"] = "compute"
    """How settings are carried to rungs that are not tuned: as powers of C, or unchanged."""
    halving: HalvingConfig | None = None
    search: dict[str, SearchConfig] = msgspec.field(default_factory=dict)
    """All of the optimizer's row when none is named."""


def check(campaign: Campaign) -> None:
    """Refuse what the fields of ``[tune]`` and of the arms could not know alone.

    Raises:
        ConfigError: The sentence names file, table, field and remedy.
    """
    table, where = campaign.tune, f"{campaign.file}, [tune]"
    tuned = [arm for arm in campaign.arms if arm.tuned]
    names = [arm.name for arm in campaign.arms]
    for arm in campaign.arms:
        if arm.reuse is None:
            continue
        here = f'{campaign.file}, [[arms]] "{arm.name}"'
        if arm.tuned:
            raise ConfigError(f"{here}: has both tuned and reuse. Keep one of them.")
        if arm.reuse not in names:
            raise ConfigError(f"{here}, reuse: {unknown_name('arm', arm.reuse, names)}")
        if arm.reuse not in [other.name for other in tuned]:
            raise ConfigError(f'{here}: reuses "{arm.reuse}", which is not tuned. Write tuned = true there.')
    if table is None:
        if tuned:
            raise ConfigError(
                f'{campaign.file}, [[arms]] "{tuned[0].name}": is tuned, and there is no [tune]. Add one.'
            )
        return
    settled = {arm.name for arm in campaign.arms if not arm.tuned and arm.reuse is None}
    for arm in tuned:
        if arm.warm_start is not None and arm.warm_start.arm not in settled:
            raise ConfigError(
                f'{campaign.file}, [[arms]] "{arm.name}": is tuned and starts from "{arm.warm_start.arm}", whose settings '
                "the same studies decide. Tune that arm in a campaign of its own and write its settings here."
            )
    if not tuned:
        raise ConfigError(f"{where}: no arm is tuned. Write tuned = true into the [[arms]] that it is meant for.")
    for name in {*table.rungs} & {*table.held_out}:
        raise ConfigError(
            f'{where}: rung "{name}" is in rungs and in held_out. A rung that tests a law is kept out of it.'
        )
    known: dict[str, list[str]] = {}
    for arm in tuned:
        for name in known_searches(arm.optimizer):
            known.setdefault(name, []).append(arm.name)
    for name, search in table.search.items():
        here = f"{campaign.file}, [tune.search.{name}]"
        if name not in known:
            raise ConfigError(f"{where}: {unknown_name('hyper-parameter', name, known)}")
        given = [search.low is not None or search.high is not None, bool(search.values), search.rule is not None]
        if sum(given) > 1:
            raise ConfigError(f"{here}: give low and high, or values, or a rule; not two of them.")
        if (search.low is None) != (search.high is None):
            raise ConfigError(f"{here}: low and high come together. Add the other one.")
        if search.values and (len(search.values) < 2 or list(search.values) != sorted(set(search.values))):
            raise ConfigError(f"{here}: values are {list(search.values)}. List two or more, rising.")
        if search.rule is not None and getattr(rule(search.rule), name, None) is None:
            raise ConfigError(f'{here}: rule "{search.rule}" says nothing about {name}. Give low and high instead.')
        if table.sampler == "grid" and not search.values:
            raise ConfigError(f"{here}: a grid needs listed values. Add: values = [...]")
    if table.sampler == "grid" and not table.search:
        raise ConfigError(f"{where}: a grid needs to know of what. Add [tune.search.peak_lr] with values.")
    if table.sampler == "grid" and table.halving:
        raise ConfigError(f"{where}: a grid is run whole. Remove [tune.halving], or use another sampler.")
    if table.halving is not None and table.in_flight < 2:
        raise ConfigError(f"{where}: halving compares trials that are asked together. Set in_flight to 2 or more.")


def search_hash(table: TuneConfig) -> str:
    """Hash of a ``[tune]`` table, defaults included: settings hold for the search that found them."""
    return hashlib.sha256(msgspec.json.encode(table, order="sorted")).hexdigest()[:12]
