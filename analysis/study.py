"""One table of runs as one answer: laws, ratio, interval, spread, and what was left out.

`fit_table` is the whole road from a table to a `Study`; the study is a value, written as fits.json with every digit
and read back as the same value.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.cells import Cells, select
from analysis.definitions import Definition, arrow, at_largest
from analysis.families import FAMILIES, Family, fit_family, left_out_error, ratio_of
from analysis.fit import Fit, Fitted, LeftOut, describe, fit_law
from analysis.intervals import FEW, bootstrap, linear, percentile, t_interval
from analysis.laws import Law, LossSurface
from analysis.load import check_table
from analysis.match import MatchRatio, at_loss, common_losses, compute_law
from analysis.paired import Difference, difference
from analysis.solve import Array
from scaling.errors import Refusal, unknown_name
from scaling.records import read_json, write_json
from scaling.spec import Strict

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 1000
BEYOND = 10.0
"""How far past the data the curve is carried, as a factor of compute; it is marked there."""
BETTER = 0.9
"""A family replaces a simpler one when its error at rungs left out is at most this share of the simpler one's."""


class Band(Strict, frozen=True):
    """A law with its pointwise interval."""

    compute: list[float]
    """PFLOP/s-days."""
    loss: list[float]
    low: list[float]
    high: list[float]


class ModelRatio(Strict, frozen=True):
    """The ratio under one family of laws: the spread of these is the uncertainty that no resampling sees."""

    family: str
    label: str
    laws: dict[str, Law]
    parameters: int
    rms: float
    """Of the log residuals."""
    left_out_error: float | None
    """Log error at rungs that the fit has not seen."""
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
    """Row of ``analysis.families.FAMILIES`` that the laws come from."""
    reason: str
    """Why that family."""
    fits: dict[str, Fit]
    headline: MatchRatio
    """At the lowest loss that both arms' runs reach."""
    interval: str
    """How the intervals were made."""
    cells: int
    paired_cells: int
    correlation: float | None
    """Of the arms' residuals within a cell."""
    rungs: list[MatchRatio]
    """At the challenger's compute of each rung."""
    curve: list[MatchRatio]
    """From the smallest run to ten times beyond the largest, in order of rising compute."""
    definitions: list[Definition]
    models: list[ModelRatio]
    difference: Difference | None
    bands: dict[str, Band]
    remarks: list[str]


class Study(Strict, frozen=True):
    """What a table of runs says."""

    table: str
    design: str
    """``ladder``: one allocation at each compute, laws of compute. ``grid``: many, surfaces over N and D."""
    baseline: str
    arms: list[str]
    fits: dict[str, Fit]
    """Each arm alone."""
    comparisons: list[Comparison]
    left_out: list[LeftOut]
    resamples: int
    seed: int


def fit_table(
    frame: pd.DataFrame,
    *,
    baseline: str | None = None,
    challenger: str | None = None,
    family: str | None = None,
    extrapolate: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Study:
    """The study of a table of runs.

    Args:
        frame: A table as `analysis.load.read_table` gives it, or any DataFrame with the required columns.
        baseline: The arm compared against; ``adamw`` where there is one.
        challenger: The arm compared; every other arm when not given.
        family: Row of ``analysis.families.FAMILIES``; chosen by the error at rungs left out when not given.
        extrapolate: Give a ratio even where the arms have no loss in common, marked as extrapolated.
        resamples: Refits of the bootstrap, used for more than ten cells.
        seed: Of the bootstrap's draws.

    Raises:
        Refusal: The table cannot be used, an arm is unknown or alone, an arm has fewer than three distinct computes, or
            the arms have no loss in common.
    """
    name = str(frame.attrs.get("name", "table"))
    if "left_out" not in frame:
        frame = check_table(frame, name)
    arms = choose_arms(frame, name, baseline, challenger)
    for arm in arms:
        _check_computes(frame, name, arm)
    ladder = is_ladder(frame, arms)
    if family is not None and family not in FAMILIES:
        raise Refusal(unknown_name("family", family, FAMILIES))
    if family is not None:
        ladder = FAMILIES[family].design == "ladder"
    alone = {arm: _alone(frame, arm, ladder=ladder) for arm in arms}
    pairs = [select(frame, (arms[0], other)) for other in arms[1:]]
    return Study(
        table=name,
        design="ladder" if ladder else "grid",
        baseline=arms[0],
        arms=list(arms),
        fits=alone,
        comparisons=[
            compare(
                cells,
                name,
                alone,
                ladder=ladder,
                family=family,
                extrapolate=extrapolate,
                resamples=resamples,
                seed=seed,
            )
            for cells in pairs
        ],
        left_out=sorted({out.row: out for cells in pairs for out in cells.left_out}.values(), key=lambda out: out.row),
        resamples=resamples,
        seed=seed,
    )


def choose_arms(frame: pd.DataFrame, name: str, baseline: str | None, challenger: str | None) -> tuple[str, ...]:
    """Baseline first, then the challengers in order of appearance.

    Raises:
        Refusal: An arm is unknown or alone, or no baseline can be told.
    """
    known = list(dict.fromkeys(frame["arm"]))
    for what, arm in (("baseline", baseline), ("challenger", challenger)):
        if arm is not None and arm not in known:
            raise Refusal(f"{name}: {unknown_name(what, arm, known)}")
    if len(known) < 2:
        raise Refusal(
            f'{name}, column arm: found one arm alone, "{known[0]}"; a ratio needs two. Add the runs of another arm, '
            f"or fit this arm's law by itself (--law power --arm {known[0]})."
        )
    if baseline is None:
        near = [arm for arm in known if arm.lower() == "adamw"]
        rest = [arm for arm in known if arm != challenger]
        if not near and len(rest) > 1:
            raise Refusal(
                f'{name}, column arm: none of {", ".join(known)} is called "adamw", so the baseline must be named. '
                f"Say which arm the others are compared against, as in --baseline {known[0]}."
            )
        baseline = near[0] if near and near[0] != challenger else rest[0]
    if baseline == challenger:
        raise Refusal(f'{name}: baseline and challenger are both "{baseline}". Name two arms.')
    return (baseline, challenger) if challenger else (baseline, *(arm for arm in known if arm != baseline))


def _check_computes(frame: pd.DataFrame, name: str, arm: str) -> None:
    from analysis.cells import rungs

    used = frame[(frame["arm"] == arm) & (frame["left_out"] == "")]
    distinct = len(np.unique(rungs(used["flops"].to_numpy(dtype=np.float64)))) if len(used) else 0
    if distinct < 3:
        raise Refusal(
            f"{name}, column flops: arm {arm} has {distinct} distinct compute{'s' if distinct != 1 else ''} among its "
            f"{len(used)} usable runs; a power law and its error need at least 3. Train more sizes."
        )
    if float(np.ptp(np.log(used["loss"].to_numpy(dtype=np.float64)))) < 1e-9:
        raise Refusal(
            f"{name}, column loss: all {len(used)} runs of arm {arm} have the loss {used['loss'].iloc[0]:g}; a law needs "
            "a loss that falls with compute. Check the column."
        )


def is_ladder(frame: pd.DataFrame, arms: tuple[str, ...]) -> bool:
    """Whether compute alone tells tokens per parameter in every arm, so that loss is a law of compute.

    Where runs of equal compute split it differently (isoFLOP sweeps, over-training), a curve through all of them is no
    frontier, and the surface over N and D is fitted in its place.
    """
    cells = select(frame, arms)
    for number in range(len(arms)):
        own = cells.rows.take(cells.rows.arm == number)
        x = np.log(own.columns["flops"])
        y = np.log(own.columns["tokens"] / own.columns["params"])
        degree = min(2, len(np.unique(np.round(x, 2))) - 1)
        left = y - np.polyval(np.polyfit(x - x.mean(), y, degree), x - x.mean())
        varied = len(np.unique(np.round(np.log(own.columns["params"]), 2)))
        if float(np.std(left)) > 0.25 and len(x) >= 8 and varied >= 3:
            return False
    return True


def _alone(frame: pd.DataFrame, arm: str, *, ladder: bool) -> Fit:
    cells = select(frame, (arm,))
    fit = fit_law("power" if ladder else "surface", cells.rows, arm=arm, numbers=cells.numbers.tolist())
    if isinstance(fit.law, LossSurface) or fit.law.exponent > 0.0:
        return fit
    raise Refusal(
        f"arm {arm}: loss does not fall with compute (exponent {fit.law.exponent:.3g}), so no compute matches a lower "
        "loss. Check that loss and flops belong together, or leave out failed runs by a column status."
    )


def compare(
    cells: Cells,
    name: str,
    alone: dict[str, Fit],
    *,
    ladder: bool,
    family: str | None,
    extrapolate: bool,
    resamples: int,
    seed: int,
) -> Comparison:
    """One challenger against the baseline, over the families that the table can carry."""
    base, other = cells.arms
    _check_losses(cells, name, extrapolate=extrapolate)
    candidates = _candidates(cells, ladder=ladder)
    chosen, reason = _choose(candidates, family, ladder=ladder)
    fitted, kind = candidates[chosen][0], FAMILIES[chosen]
    fits = {
        arm: describe(
            fitted,
            kind.form,
            cells.rows,
            arm=arm,
            number=number,
            numbers=cells.numbers[cells.rows.arm == number].tolist(),
            objective=kind.objective,
        )
        for number, arm in enumerate(cells.arms)
    }
    losses, places = _places(fits[base], fits[other], cells, extrapolate=extrapolate)
    low, high, how = _intervals(fitted, cells, losses, resamples, seed)
    points = [at_loss(fits[base], fits[other], loss, (lo, hi)) for loss, lo, hi in zip(losses, low, high, strict=True)]
    line = difference(cells)
    named = [
        *([found] if (found := arrow(alone[base], alone[other], cells)) else []),
        *at_largest(fits[base], fits[other], line),
    ]
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
        models=[_model(key, found, error, cells, losses[:1]) for key, (found, error) in candidates.items()],
        difference=line,
        bands={arm: _band(fitted, cells, number, fits[arm]) for number, arm in enumerate(cells.arms)},
        remarks=[fit.remark for fit in fits.values() if fit.remark],
    )


def _check_losses(cells: Cells, name: str, *, extrapolate: bool) -> None:
    ranges = [
        (float(own.min()), float(own.max()))
        for own in (cells.rows.loss[cells.rows.arm == arm] for arm in range(len(cells.arms)))
    ]
    if not extrapolate and not max(r[0] for r in ranges) <= min(r[1] for r in ranges):
        told = "; ".join(f"{arm} {r[0]:.4g} to {r[1]:.4g}" for arm, r in zip(cells.arms, ranges, strict=True))
        raise Refusal(
            f"{name}, column loss: the arms have no loss in common ({told}), so every ratio would be an "
            "extrapolation. Train larger runs of the worse arm or smaller ones of the better, or pass --extrapolate to "
            "see marked values."
        )


def _candidates(cells: Cells, *, ladder: bool) -> dict[str, tuple[Fitted, float | None]]:
    found: dict[str, tuple[Fitted, float | None]] = {}
    rungs = len(np.unique(cells.rung))
    for key, family in FAMILIES.items():
        if (family.design == "ladder") != ladder or family.size(2) > len(cells.rows.loss) - 2:
            continue
        if ladder and family.has_floor and rungs < 4:
            continue
        fitted = fit_family(family, cells.rows, 2, best_of=8)
        found[key] = (fitted, left_out_error(family, cells, fitted))
    if not found:
        raise Refusal(
            f"{', '.join(cells.arms)}: {len(cells.rows.loss)} runs are too few for a surface over parameters and tokens "
            "(7 parameters for two arms), and they are not on one ladder of computes. Add runs."
        )
    return found


def _choose(candidates: dict[str, tuple[Fitted, float | None]], family: str | None, *, ladder: bool) -> tuple[str, str]:
    if family is not None:
        if family not in candidates:
            raise Refusal(f"family {family}: these runs are too few for it. They carry {', '.join(candidates)}.")
        return family, "as asked"
    default = next(iter(candidates))
    usable = {
        key: error
        for key, (fitted, error) in candidates.items()
        if error is not None and np.isfinite(ratio_of(fitted, fitted.theta, np.exp(fitted.problem.loss[:0]))).all()
    }
    first = usable.get(default)
    if first is None:
        return default, "the simplest: too few rungs to leave one out and compare"
    better = {key: error for key, error in usable.items() if error < BETTER * first and _falls(candidates[key][0])}
    if not better:
        return default, f"no other predicts rungs left out clearly better ({first:.2%} root mean square error)"
    least = min(better.values())
    winner = min((key for key in better if better[key] <= least / BETTER), key=lambda key: FAMILIES[key].size(2))
    return winner, (
        f"it predicts rungs left out with {better[winner]:.2%} root mean square error, {FAMILIES[default].label} with {first:.2%}"
    )


def _falls(fitted: Fitted) -> bool:
    return all(
        value > 0.0 for slot, value in zip(fitted.design.slots, fitted.theta, strict=True) if slot.column is not None
    )


def _places(baseline: Fit, challenger: Fit, cells: Cells, *, extrapolate: bool) -> tuple[Array, int]:
    """Losses at which the ratio is wanted: the headline's, one for each rung, the curve's; and how many rungs."""
    b, c = compute_law(baseline.law), compute_law(challenger.law)
    floor = max(b.floor, c.floor)
    try:
        headline = common_losses(baseline, challenger)[0]
    except Refusal:
        if not extrapolate:
            raise
        headline = max(c.loss(challenger.compute_range[1]), b.loss(baseline.compute_range[1]))
    own = cells.rows.arm == 1
    flops = cells.rows.columns["flops"][own]
    steps = [float(np.exp(np.log(flops[cells.rung[own] == rung]).mean())) for rung in np.unique(cells.rung[own])]
    if len(steps) > 8:
        steps = list(np.geomspace(min(steps), max(steps), 7))
    from scaling.units import pflops_days

    rungs = [loss for loss in (c.loss(pflops_days(step)) for step in steps) if loss > floor]
    ends = [fit.compute_range for fit in (baseline, challenger)]
    grid = np.geomspace(min(end[0] for end in ends), BEYOND * max(end[1] for end in ends), 81)
    curve = b.loss(grid)
    curve = curve[curve > floor + 1e-9]
    return np.array([headline, *rungs, *curve.tolist()]), len(rungs)


def _intervals(fitted: Fitted, cells: Cells, losses: Array, resamples: int, seed: int) -> tuple[Array, Array, str]:
    def quantity(theta: Array) -> Array:
        return ratio_of(fitted, theta, losses)

    centre = quantity(fitted.theta)
    count = len(np.unique(cells.cell))
    shared = len(cells.paired)
    paired = "paired within cells" if shared >= 3 else "arms independent: they share no cells"
    if count <= FEW:
        low, high = t_interval(fitted, cells, quantity)
        freedom = linear(fitted, cells).freedom
        how = f"95 % t interval, {freedom:.0f} degrees of freedom, {paired}, exponents' errors included"
        if np.isnan(low).all():
            how = "none: as many parameters as cells leave nothing to estimate the noise from"
    else:
        groups = cells.cell if shared >= 3 else cells.cell + (cells.rows.arm * (cells.cell.max() + 1))
        draws = np.array([quantity(theta) for theta in bootstrap(fitted, groups, resamples=resamples, seed=seed)])
        low, high = percentile(draws, centre)
        how = f"95 % percentile interval of {resamples:,} case resamples of {count} cells, all laws refitted, {paired}"
    return np.exp(low), np.exp(high), how


def _model(key: str, fitted: Fitted, error: float | None, cells: Cells, losses: Array) -> ModelRatio:
    def quantity(theta: Array) -> Array:
        return ratio_of(fitted, theta, losses)

    family: Family = FAMILIES[key]
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


def _band(fitted: Fitted, cells: Cells, arm: int, fit: Fit) -> Band:
    grid = np.geomspace(fit.compute_range[0] / 1.5, fit.compute_range[1] * BEYOND, 49)

    def quantity(theta: Array) -> Array:
        try:
            return np.asarray(np.log(compute_law(fitted.law(arm, theta)).loss(grid)))
        except Refusal:
            return np.full(len(grid), np.nan)

    centre = quantity(fitted.theta)
    low, high = t_interval(fitted, cells, quantity)
    low, high = (np.where(np.isfinite(end), end, centre) for end in (low, high))
    return Band(
        compute=grid.tolist(), loss=np.exp(centre).tolist(), low=np.exp(low).tolist(), high=np.exp(high).tolist()
    )


def write_study(study: Study, path: Path | str) -> None:
    """The study as JSON with every digit."""
    write_json(Path(path), study)


def read_study(path: Path | str) -> Study:
    """The study that `write_study` wrote, equal to what was written."""
    return read_json(Path(path), Study)
