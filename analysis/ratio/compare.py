"""Comparison of one challenger with the baseline: choice of the law family, ratios, intervals, and other families."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import SAME_COMPUTE, Array, Cells
from analysis.data.table import RunsTable
from analysis.fitting.families import LAW_FAMILIES, Factors, factors, fit_family, left_out_error, log_loss_of, ratio_of
from analysis.fitting.fit import Fit, Minimum, describe
from analysis.fitting.laws import LAWS, Law
from analysis.ratio.cost_metrics import ConventionRatio, convention_ratios
from analysis.ratio.definitions import Definition, arrow, at_largest, from_runs
from analysis.ratio.match import MatchRatio, at_loss, common_losses
from analysis.uncertainty.intervals import (
    MAX_CELLS_FOR_T_INTERVAL,
    ROUNDING,
    bootstrap,
    has_width,
    linear,
    percentile,
    t_interval,
)
from analysis.uncertainty.paired import Difference, cell_means, difference
from analysis.uncertainty.robustness import Interval, RatioWithoutRung, intervals_by_method, jackknife
from scaling.errors import UserError
from scaling.io import Strict
from scaling.units import pflops_days

DEFAULT_RESAMPLES = 1000
CURVE_EXTRAPOLATION = 10.0
"""Factor of compute beyond the largest run up to which curves go on; they are marked there."""
NO_NOISE_REMARK = "none: the losses follow the laws or each other to rounding, so there is no noise to estimate it from"
CV_IMPROVEMENT = 0.9
"""A family replaces a simpler one when its error at rungs left out is at most this share of the simpler one's."""
SEPARATE_FLOORS_IMPROVEMENT = 0.5
"""The same for families with a floor for each arm, against the best of the others."""
MAX_LISTED_RUNGS = 8
"""Rungs up to which each has its ratio; of more, seven computes between the ends have one."""


class StudyOptions(Strict, frozen=True):
    """Options of `analysis.ratio.study.fit_table` as they were passed."""

    baseline: str | None = None
    challenger: str | None = None
    family: str | None = None
    extrapolate: bool = False
    resamples: int = DEFAULT_RESAMPLES
    seed: int = 0


class Band(Strict, frozen=True):
    """A law with its pointwise interval."""

    compute: list[float]
    """PFLOP/s-days."""
    loss: list[float]
    low: list[float]
    high: list[float]


class ModelRatio(Strict, frozen=True):
    """The ratio under one law family; the spread over families is an uncertainty that resampling does not show."""

    family: str
    label: str
    laws: dict[str, Law]
    parameters: int
    rms: float
    """Root mean square of the log residuals."""
    left_out_error: float | None
    """Log error at rungs left out of the fit."""
    ratio: float | None
    """At the headline's loss; None where a law of this family never gets there."""
    low: float | None
    high: float | None
    remark: str


class Comparison(Strict, frozen=True):
    """One challenger against the baseline."""

    baseline: str
    challenger: str
    family: str
    """Row of ``analysis.fitting.families.LAW_FAMILIES`` that the laws come from."""
    reason: str
    """Why that family."""
    fits: dict[str, Fit]
    headline: MatchRatio
    """At the lowest loss that both arms' runs reach."""
    interval: str
    """Method of the intervals."""
    cells: int
    paired_cells: int
    correlation: float | None
    """Correlation of the arms' residuals within a cell."""
    rungs: list[MatchRatio]
    """At the challenger's compute of each rung."""
    curve: list[MatchRatio]
    """From the smallest run to ten times beyond the largest, in order of rising compute."""
    definitions: list[Definition]
    conventions: list[ConventionRatio]
    """The ratio in other costs: other counts of FLOPs, wall-clock."""
    factors: list[Factors]
    """Efficiency of the challenger's parameters and tokens, for families with shared exponents on a grid."""
    models: list[ModelRatio]
    difference: Difference | None
    intervals: list[Interval]
    """The headline's interval by other methods."""
    jackknife: list[RatioWithoutRung]
    """The headline's ratio without each rung in turn; empty with fewer than four rungs."""
    bands: dict[str, Band]
    remarks: list[str]


def compare(
    cells: Cells, table: RunsTable, alone: dict[str, Fit], options: StudyOptions, *, ladder: bool
) -> Comparison:
    """One challenger against the baseline, over the families that the table can carry."""
    base, other = cells.arms
    extrapolate, resamples, seed = options.extrapolate, options.resamples, options.seed
    _check_losses(cells, table.name, extrapolate=extrapolate)
    candidates = _candidates(cells, ladder=ladder)
    chosen, reason = _choose(candidates, options.family)
    fitted, kind = candidates[chosen][0], LAW_FAMILIES[chosen]
    fits = {
        arm: describe(
            fitted,
            kind.form,
            cells.rows,
            arm=arm,
            number=number,
            numbers=cells.numbers[cells.rows.arm == number].tolist(),
            objective=LAWS.row(kind.form).objective,
        )
        for number, arm in enumerate(cells.arms)
    }
    losses, places = _places(fits[base], fits[other], cells, extrapolate=extrapolate)
    low, high, how = _intervals(fitted, cells, losses, resamples, seed)
    points = [at_loss(fits[base], fits[other], loss, (lo, hi)) for loss, lo, hi in zip(losses, low, high, strict=True)]
    line = difference(cells) if ladder else None
    first = arrow(alone[base], alone[other], cells)
    named = [first] if first else []
    named += at_largest(fits[base], fits[other], line)
    named += from_runs(fits[base], fits[other], cells) if ladder else []
    return Comparison(
        baseline=base,
        challenger=other,
        family=chosen,
        reason=reason,
        fits=fits,
        headline=points[0],
        interval=how,
        cells=len(np.unique(cells.cell)),
        paired_cells=len(cells.paired),
        correlation=linear(fitted, cells).correlation,
        rungs=points[1 : 1 + places],
        curve=points[1 + places :],
        definitions=named,
        conventions=convention_ratios(table.frame, cells, kind, fitted, float(losses[0])),
        factors=_factors(chosen, fitted, cells, resamples, seed),
        models=[_model(key, found, error, cells, losses[:1]) for key, (found, error) in candidates.items()],
        difference=line,
        intervals=intervals_by_method(fitted, cells, float(losses[0]), line, resamples=min(resamples, 500), seed=seed),
        jackknife=jackknife(fitted, cells, float(losses[0])),
        bands={arm: _band(fitted, cells, number, fits[arm]) for number, arm in enumerate(cells.arms)},
        remarks=[fit.remark for fit in fits.values() if fit.remark] + _bits_remark(cells),
    )


def _check_losses(cells: Cells, name: str, *, extrapolate: bool) -> None:
    losses = {arm: cells.rows.loss[cells.rows.arm == number] for number, arm in enumerate(cells.arms)}
    if not extrapolate and max(own.min() for own in losses.values()) > min(own.max() for own in losses.values()):
        ranges_text = "; ".join(f"{arm} {own.min():.4g} to {own.max():.4g}" for arm, own in losses.items())
        raise UserError(
            f"{name}, column loss: the arms have no loss in common ({ranges_text}), so every ratio would be an "
            "extrapolation. Train larger runs of the worse arm or smaller ones of the better, or pass --extrapolate to "
            "see marked values."
        )


def _bits_remark(cells: Cells) -> list[str]:
    """A warning where one arm's losses are 1 / ln 2 times the other's at every shared compute: bits against nats.

    A suspicion and no error, because losses alone cannot prove their unit.
    """
    (one, x), (two, other) = cell_means(cells, 0), cell_means(cells, 1)
    apart = np.abs(one - two)[np.abs(x - other) <= SAME_COMPUTE]
    if len(apart) < 3 or np.any(np.abs(apart + np.log(np.log(2.0))) > 0.05):
        return []
    low, high = cells.arms if one.mean() < two.mean() else cells.arms[::-1]
    return [
        f"{high}'s losses are about 1.44 = 1 / ln 2 times {low}'s at every shared compute: {high} may be in bits and {low} in "
        "nats, and then every ratio here is wrong. The column loss holds nats per token: multiply losses in bits by ln 2."
    ]


def _candidates(cells: Cells, *, ladder: bool) -> dict[str, tuple[Minimum, float | None]]:
    found: dict[str, tuple[Minimum, float | None]] = {}
    rungs = len(np.unique(cells.rung))
    for key, family in LAW_FAMILIES.items():
        form = LAWS.row(family.form)
        if not form.has_frontier or not set(form.columns) <= set(cells.rows.columns):
            continue
        if (family.design == "ladder") != ladder or family.size(2) > len(cells.rows.loss) - 2:
            continue
        if ladder and family.has_floor and rungs < 4:
            continue
        fitted = fit_family(family, cells.rows, 2, best_of=8)
        found[key] = (fitted, left_out_error(family, cells, fitted))
    if not found:
        raise UserError(
            f"{', '.join(cells.arms)}: {len(cells.rows.loss)} runs are too few for a surface over parameters and tokens "
            "(7 parameters for two arms), and they are not on one ladder of computes. Add runs."
        )
    return found


def _choose(candidates: dict[str, tuple[Minimum, float | None]], family: str | None) -> tuple[str, str]:
    if family is not None:
        if family not in candidates:
            raise UserError(
                f"family {family}: these runs cannot be fitted with it, or it gives no law of compute. Use one of "
                f"{', '.join(candidates)}, or add runs."
            )
        return family, "as requested"
    default = next(iter(candidates))
    usable = {key: error for key, (_, error) in candidates.items() if error is not None}
    first = usable.get(default)
    if first is None:
        return default, "the simplest: too few rungs to leave one out and compare"
    # The floor is a property of the data, so a floor of its own for each arm needs strong evidence.
    shared = min(error for key, error in usable.items() if not LAW_FAMILIES[key].separate_floors)
    better = {
        key: error
        for key, error in usable.items()
        if error < CV_IMPROVEMENT * first
        and _falls(candidates[key][0])
        and (not LAW_FAMILIES[key].separate_floors or error < SEPARATE_FLOORS_IMPROVEMENT * shared)
    }
    if not better:
        return default, f"no other predicts rungs left out clearly better ({first:.2%} root mean square error)"
    least = min(better.values())
    winner = min(
        (key for key in better if better[key] <= least / CV_IMPROVEMENT), key=lambda key: LAW_FAMILIES[key].size(2)
    )
    return winner, (
        f"it predicts rungs left out with {better[winner]:.2%} root mean square error, {LAW_FAMILIES[default].label} with {first:.2%}"
    )


def _falls(fitted: Minimum) -> bool:
    return all(
        value > 0.0 for slot, value in zip(fitted.layout.slots, fitted.theta, strict=True) if slot.column is not None
    )


def _places(baseline: Fit, challenger: Fit, cells: Cells, *, extrapolate: bool) -> tuple[Array, int]:
    """Losses at which the ratio is evaluated: the headline's, one for each rung, the curve's; and the number of rungs."""
    b, c = baseline.law.frontier(), challenger.law.frontier()
    floor = max(b.floor, c.floor)
    try:
        headline = common_losses(baseline, challenger)[0]
    except UserError:
        if not extrapolate:
            raise
        headline = max(c.loss(challenger.compute_range[1]), b.loss(baseline.compute_range[1]))
    own = cells.rows.arm == 1
    flops = cells.rows.columns["flops"][own]
    steps = [float(np.exp(np.log(flops[cells.rung[own] == rung]).mean())) for rung in np.unique(cells.rung[own])]
    if len(steps) > MAX_LISTED_RUNGS:
        steps = list(np.geomspace(min(steps), max(steps), 7))
    rungs = [loss for loss in (c.loss(pflops_days(step)) for step in steps) if loss > floor]
    ends = [fit.compute_range for fit in (baseline, challenger)]
    grid = np.geomspace(min(end[0] for end in ends), CURVE_EXTRAPOLATION * max(end[1] for end in ends), 81)
    curve = b.loss(grid)
    curve = curve[curve > floor + 1e-9]
    return np.array([headline, *rungs, *curve.tolist()]), len(rungs)


def _intervals(fitted: Minimum, cells: Cells, losses: Array, resamples: int, seed: int) -> tuple[Array, Array, str]:
    quantity = partial(ratio_of, fitted, losses=losses)
    count = len(np.unique(cells.cell))
    shared = len(cells.paired)
    paired = "paired within cells" if shared >= 3 else "arms independent: they share no cells"
    if count <= MAX_CELLS_FOR_T_INTERVAL:
        low, high = t_interval(fitted, cells, quantity)
        freedom = linear(fitted, cells).freedom
        how = f"95 % t interval, {freedom:.0f} degrees of freedom, {paired}, exponents' errors included"
        if np.isnan(low).all():
            few = "none: as many parameters as cells leave nothing to estimate the noise from"
            how = NO_NOISE_REMARK if freedom >= 1.0 else few
    else:
        draws = quantity(bootstrap(fitted, _groups(cells), resamples=resamples, seed=seed))
        low, high = has_width(*percentile(draws, quantity(fitted.theta)))
        how = f"95 % percentile interval of {resamples:,} case resamples of {count} cells, all laws refitted, {paired}"
        if np.isnan(low).all():
            how = NO_NOISE_REMARK
    return np.exp(low), np.exp(high), how


def _groups(cells: Cells) -> NDArray[np.intp]:
    """Groups to resample: whole cells where the arms share them, else each arm's own."""
    return cells.cell if len(cells.paired) >= 3 else cells.cell + cells.rows.arm * (cells.cell.max() + 1)


def _factors(chosen: str, fitted: Minimum, cells: Cells, resamples: int, seed: int) -> list[Factors]:
    if not LAW_FAMILIES[chosen].has_factors:
        return []
    draws = bootstrap(fitted, _groups(cells), resamples=resamples, seed=seed)
    found = [factors(fitted, draws, number, arm) for number, arm in enumerate(cells.arms) if number]
    return [one for one in found if one.params.high - one.params.low > ROUNDING]


def _model(key: str, fitted: Minimum, error: float | None, cells: Cells, losses: Array) -> ModelRatio:
    quantity = partial(ratio_of, fitted, losses=losses)
    family = LAW_FAMILIES[key]
    value = float(quantity(fitted.theta)[0])
    low, high = (float(end[0]) for end in t_interval(fitted, cells, quantity))
    ends = np.isfinite([value, low, high]).all()
    return ModelRatio(
        family=key,
        label=family.label,
        laws={arm: fitted.law(number) for number, arm in enumerate(cells.arms)},
        parameters=family.size(len(cells.arms)),
        rms=float(np.sqrt(np.mean(fitted.log_residuals() ** 2))),
        left_out_error=error,
        ratio=float(np.exp(value)) if np.isfinite(value) else None,
        low=float(np.exp(low)) if ends else None,
        high=float(np.exp(high)) if ends else None,
        remark="" if np.isfinite(value) else "a law of this family never reaches the headline's loss",
    )


def _band(fitted: Minimum, cells: Cells, arm: int, fit: Fit) -> Band:
    grid = np.geomspace(fit.compute_range[0] / 1.5, fit.compute_range[1] * CURVE_EXTRAPOLATION, 49)
    quantity = partial(log_loss_of, fitted, compute=grid, arm=arm)
    centre = quantity(fitted.theta)
    low, high = t_interval(fitted, cells, quantity)
    low, high = (np.where(np.isfinite(end), end, centre) for end in (low, high))
    return Band(
        compute=grid.tolist(), loss=np.exp(centre).tolist(), low=np.exp(low).tolist(), high=np.exp(high).tolist()
    )
