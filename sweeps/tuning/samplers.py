"""The next setting to try: a pure function of what was tried before, so that a killed tuner asks again for the same.

The samplers are Optuna's. They see a study in memory that holds each trial at its place in the range of now, so a range
that was widened does not make the sampler forget the trials before it.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from scaling.io import Strict
from sweeps.config.search_space import Dimension, Values

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class CompletedTrial(msgspec.Struct, frozen=True, kw_only=True):
    """A trial as a sampler sees it: finished with a loss, or one whose loss is not known yet."""

    values: Values
    loss: float | None
    """Of a pruned trial: at the budget where it was left."""
    pruned: bool = False


def _tpe(seed: int, startup: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    # With a constant liar: settings under way count as bad ones, so that several in flight do not crowd together.
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)


def _gp(seed: int, startup: int) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=startup)


SAMPLERS: dict[str, Callable[[int, int], BaseSampler] | None] = {
    "tpe": _tpe,
    "gp": _gp,
    # Quasi-random points to the end, and every combination of listed values.
    "quasi-random": None,
    "grid": None,
}
"""By the name that a campaign writes. All but the grid begin with quasi-random points."""


def grid(dimensions: Sequence[Dimension]) -> list[Values]:
    """Every combination of listed values, the last dimension fastest."""
    names = [dimension.name for dimension in dimensions]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*(d.values for d in dimensions))]


class Sampling(Strict, frozen=True):
    """How settings are chosen."""

    sampler: str
    startup: int
    seed: int


def propose(
    sampling: Sampling, dimensions: Sequence[Dimension], seen: Sequence[CompletedTrial], index: int, context: int
) -> Values:
    """The values of trial `index`.

    Args:
        sampling: Sampler, length of the quasi-random start, seed.
        dimensions: Ranges of now.
        seen: Trials before this one, of which those in flight have no loss.
        index: Number of the trial among those that count, from 0.
        context: For whole windows in a batch.
    """
    if sampling.sampler == "grid":
        return grid(dimensions)[index]
    make = SAMPLERS[sampling.sampler]
    finished = sum(trial.loss is not None for trial in seen)
    if make is None or index < sampling.startup or finished < 2:
        return _from_shares(dimensions, _sobol(len(dimensions), sampling.seed, index), context)
    return _from_shares(dimensions, _sampled(make, sampling, dimensions, seen, index), context)


def _from_shares(dimensions: Sequence[Dimension], shares: Sequence[float], context: int) -> Values:
    return {d.name: d.at(share, context) for d, share in zip(dimensions, shares, strict=True)}


@functools.lru_cache(maxsize=64)
def _sobol(dimensions: int, seed: int, index: int) -> tuple[float, ...]:
    from scipy.stats import qmc

    engine = qmc.Sobol(dimensions, scramble=True, rng=seed)
    if index:
        engine.fast_forward(index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one point at a time is no power of two
        return tuple(float(share) for share in engine.random(1)[0])


def _sampled(
    make: Callable[[int, int], BaseSampler],
    sampling: Sampling,
    dimensions: Sequence[Dimension],
    seen: Sequence[CompletedTrial],
    index: int,
) -> list[float]:
    """Shares of the way through each range, from an Optuna sampler."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, BaseDistribution] = {
        d.name: IntDistribution(0, len(d.values) - 1) if d.values else FloatDistribution(0.0, 1.0) for d in dimensions
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=make(sampling.seed * 100_003 + index, 0))
        for trial in seen:
            shares: dict[str, Any] = {d.name: _place(d, trial.values[d.name]) for d in dimensions}
            pruned = trial.pruned and trial.loss is not None
            state = TrialState.PRUNED if pruned else TrialState.RUNNING if trial.loss is None else TrialState.COMPLETE
            study.add_trial(
                create_trial(
                    state=state,
                    value=trial.loss,
                    params=shares,
                    distributions=space,
                    intermediate_values={0: float(trial.loss)} if pruned and trial.loss is not None else None,
                )
            )
        asked = study.ask(space).params
    return [(asked[d.name] + 0.5) / len(d.values) if d.values else float(asked[d.name]) for d in dimensions]


def _place(dimension: Dimension, value: float) -> float | int:
    if dimension.values:
        return min(range(len(dimension.values)), key=lambda number: abs(dimension.values[number] - value))
    low, high = dimension.span
    return min(max((dimension.search.position(value) - low) / (high - low), 0.0), 1.0)
