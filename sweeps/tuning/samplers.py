"""Samplers of settings, and the export of studies to Optuna's dashboard. The only module that imports Optuna.

A proposal is a pure function of the trials before it, so a restarted tuner makes the same proposals. The samplers see a
fresh study in memory that holds each trial at its position in the current range, so a widened range keeps its trials.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.config.search_space import Dimension, Values
from sweeps.config.tune import TuneConfig
from sweeps.tuning.trials import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


def _tpe(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    # With a constant liar, settings in flight count as bad ones, so that those of one generation do not crowd together.
    return TPESampler(seed=seed, n_startup_trials=0, multivariate=True, constant_liar=True)


def _gp(seed: int) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=0)


SAMPLERS: dict[str, Callable[[int], BaseSampler] | None] = {
    "tpe": _tpe,
    "gp": _gp,
    # These two need no model of the loss.
    "quasi-random": None,
    "grid": None,
}
"""By the name that a campaign writes. All but the grid begin with quasi-random points."""


def propose(
    config: TuneConfig, dimensions: Sequence[Dimension], trials: Sequence[Trial], index: int, context: int
) -> Values:
    """The values of the next trial, after `trials` that have not failed; those in flight have no loss.

    `index` is a place in the quasi-random sequence: the number of `trials`, or a later place to replace a duplicate. A
    batch is a whole number of sequences of `context` tokens.
    """
    if config.sampler == "grid":
        tried = [trial.values for trial in trials]
        points = itertools.product(*(dimension.values for dimension in dimensions))  # the last dimension fastest
        names = [dimension.name for dimension in dimensions]
        return next(values for point in points if (values := dict(zip(names, point, strict=True))) not in tried)
    make = SAMPLERS[config.sampler]
    completed = sum(trial.loss is not None for trial in trials)
    if make is None or index < config.startup or completed < 2:
        shares: Sequence[float] = _sobol(len(dimensions), config.seed, index)
    else:
        shares = _sampled(make(config.seed * 100_003 + index), dimensions, trials)
    return {d.name: d.at(share, context) for d, share in zip(dimensions, shares, strict=True)}


@functools.lru_cache(maxsize=64)
def _sobol(dimensions: int, seed: int, index: int) -> tuple[float, ...]:
    from scipy.stats import qmc

    engine = qmc.Sobol(dimensions, scramble=True, rng=seed)
    if index:
        engine.fast_forward(index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one point at a time is not a power of two
        return tuple(float(share) for share in engine.random(1)[0])


def _sampled(sampler: BaseSampler, dimensions: Sequence[Dimension], trials: Sequence[Trial]) -> list[float]:
    """The proposal of an Optuna sampler, as shares of the way through each range."""
    import optuna
    from optuna.distributions import FloatDistribution, IntDistribution

    space: dict[str, BaseDistribution] = {
        d.name: IntDistribution(0, len(d.values) - 1) if d.values else FloatDistribution(0.0, 1.0) for d in dimensions
    }
    with _quiet_optuna():
        study = optuna.create_study(sampler=sampler)
        for trial in trials:
            shares = {d.name: _share(d, trial.values[d.name]) for d in dimensions}
            study.add_trial(_frozen(trial, params=shares, distributions=space))
        proposal = study.ask(space).params
    # A listed value is proposed by its index; the middle of its part of the range is its share.
    return [(proposal[d.name] + 0.5) / len(d.values) if d.values else float(proposal[d.name]) for d in dimensions]


def _share(dimension: Dimension, value: float) -> float | int:
    """Position of a value in the range, from 0 to 1; of a listed value its index."""
    if dimension.values:
        return min(range(len(dimension.values)), key=lambda number: abs(dimension.values[number] - value))
    low, high = dimension.span
    return min(max((dimension.search.position(value) - low) / (high - low), 0.0), 1.0)


def export_optuna(studies: Mapping[str, tuple[Sequence[Dimension], Sequence[Trial]]], path: Path) -> None:
    """Write the search space and the trials of studies, by name, to an Optuna journal file, which replaces an old one.

    ``optuna-dashboard PATH`` shows it; nothing reads it back.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _quiet_optuna():
            storage = JournalStorage(JournalFileBackend(str(temporary)))
            for name, (dimensions, trials) in studies.items():
                study = optuna.create_study(study_name=name, storage=storage, direction="minimize")
                for trial in trials:
                    space: dict[str, BaseDistribution] = {}
                    for d in dimensions:
                        ends = [trial.values[d.name], *(d.values or (d.search.low, d.search.high))]
                        space[d.name] = FloatDistribution(min(ends), max(ends), log=d.search.scale == "log")
                    study.add_trial(_frozen(trial, params=trial.values, distributions=space))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _frozen(trial: Trial, *, params: Mapping[str, float], distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {"running": "RUNNING", "complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    return create_trial(
        state=TrialState[states[trial.state]],
        value=trial.loss,
        params=dict(params),
        distributions=distributions,
        intermediate_values={0: trial.loss} if trial.state == "pruned" and trial.loss is not None else None,
        user_attrs={"run": trial.run},
    )
