"""Forecast of a campaign: the interval of its plan, of the plan with one change, and of the best plans for their cost.

A plan is a number of seeds at each rung of a list. Plans are compared at one loss, that of the challenger at the largest
planned rung: a plan without that rung then shows the cost of extrapolating to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from analysis.data.cells import Array
from analysis.fitting.families import LAW_FAMILIES
from analysis.power.simulate import BOOTSTRAP_REMARK, Forecast, Laws, Noise, PlannedCells, Truth, forecasts, simulate
from analysis.ratio.study import Study
from analysis.uncertainty.intervals import MAX_CELLS_FOR_T_INTERVAL
from scaling.errors import UserError
from scaling.io import Strict
from scaling.units import FLOPS_PER_PFLOPS_DAY

SCREENING_STUDIES = 150
"""Studies of each plan of the search; those near the frontier are then simulated in full."""

SCREENING_MARGIN = 1.15
"""A plan is simulated in full where its width in the screening is within this factor of the frontier."""


class RungOption(NamedTuple):
    """A rung that plans may use."""

    name: str
    params: float
    tokens: float
    flops: float
    hours: float
    """GPU-hours of one seed of both arms."""


class PlanForecast(Strict, frozen=True):
    """The interval of one plan at the target loss."""

    name: str
    design: str
    """Rungs, and seeds where there are several."""
    cells: int
    hours: float
    """GPU-hours."""
    width: float | None
    """Median width of the 95 % interval of the ratio."""
    excludes: float
    bias: float | None


class DesignForecast(Strict, frozen=True):
    """Forecast intervals of a campaign and of other plans for its arms."""

    campaign: str
    baseline: str
    challenger: str
    studies: int
    margin: float
    family: str
    laws: Laws
    noise: Noise
    lost: float
    rungs: list[str]
    """Planned rungs; the forecasts are at the challenger's loss at each."""
    forecasts: list[Forecast]
    target_rung: str
    plan: PlanForecast
    changed: list[PlanForecast]
    searched: list[PlanForecast]
    """Every plan of the search."""
    frontier: list[PlanForecast]
    wanted: float | None
    budget: float | None
    cheapest: PlanForecast | None
    """The cheapest plan that reaches the wanted width within the budget."""
    verdict: list[str]
    assumptions: list[str]


class _Simulator(NamedTuple):
    """Settings that all simulations of one forecast share."""

    points: Sequence[RungOption]
    cells: PlannedCells
    truth: Truth
    noise: Noise
    target: Array
    family: str
    lost: float
    margin: float
    seed: int
    simulated: Callable[[int], None]
    """Takes the number of studies that were simulated, after each design."""

    def forecast(self, name: str, seeds: Sequence[int], studies: int) -> PlanForecast:
        """The forecast of one plan."""
        which = np.repeat(np.arange(len(self.points)), seeds).astype(np.intp)
        used = [(point, count) for point, count in zip(self.points, seeds, strict=True) if count]
        width, excludes, bias = None, 0.0, None
        try:
            found = simulate(
                self.cells.take(which),
                self.truth,
                self.noise,
                self.target,
                family=self.family,
                lost=self.lost,
                studies=studies,
                seed=self.seed,
            )
        except UserError:
            pass  # too few cells for the family, hence no interval
        else:
            one = forecasts(found, self.truth, self.target, margin=self.margin)[0]
            width, excludes, bias = one.width, one.excludes, one.bias
        self.simulated(studies)
        return PlanForecast(
            name=name,
            design=", ".join(f"{point.name}{f' x{count}' if count > 1 else ''}" for point, count in used),
            cells=int(sum(seeds)),
            hours=float(sum(point.hours * count for point, count in used)),
            width=width,
            excludes=excludes,
            bias=bias,
        )


def forecast(
    *,
    campaign: str,
    arms: tuple[str, str],
    points: Sequence[RungOption],
    plan: Sequence[int],
    changed: Mapping[str, Sequence[int]],
    searched: Sequence[Sequence[int]],
    laws: Laws,
    noise: Noise,
    family: str | None = None,
    lost: float = 0.0,
    margin: float = 1.0,
    wanted: float | None = None,
    budget: float | None = None,
    studies: int = 1000,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> DesignForecast:
    """The forecast of a plan and of its alternatives.

    Args:
        campaign: Its name.
        arms: Baseline and challenger.
        points: Rungs, by rising compute.
        plan: Seeds at each rung.
        changed: Plans with one change, by name.
        searched: Plans among which the cheapest is searched.
        laws: Assumed laws.
        noise: Assumed noise.
        family: Row of ``analysis.fitting.families.LAW_FAMILIES``; without it the one that the laws were fitted with, else
            ``lines``, or ``shared-floor`` where the laws have a floor.
        lost: Chance that a run gives no loss.
        margin: Ratio that the interval should exclude.
        wanted: Wanted width of the interval.
        budget: GPU-hours at most.
        studies: Synthetic studies of the plan, its changes and the plans on the frontier.
        seed: Seed of the noise.
        progress: Called with the share of the work that is done, 0 to 1, after each plan.

    Raises:
        UserError: The plan has too few cells for the family.
    """
    cells = PlannedCells(*(np.array(column, dtype=np.float64) for column in list(zip(*points, strict=True))[1:4]))
    truth = Truth(laws, cells)
    family = family or laws.family or ("shared-floor" if laws.has_floor else "lines")
    own = [at for at, count in enumerate(plan) if count]
    at = truth.loss(cells.flops[own], 1)
    # The number of plans near the frontier is not known before the screening; a tenth is usual.
    total = len(searched) * (min(SCREENING_STUDIES, studies) + 0.1 * studies) + (1 + len(changed)) * studies
    done = 0

    def simulated(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done / total, 1.0))

    simulator = _Simulator(points, cells, truth, noise, at[-1:], family, lost, margin, seed, simulated)
    whole = cells.take(np.repeat(np.arange(len(points)), plan).astype(np.intp))
    found = simulate(whole, truth, noise, at, family=family, lost=lost, studies=studies, seed=seed)
    rows = [simulator.forecast("", seeds, min(SCREENING_STUDIES, studies)) for seeds in searched]
    frontier = _frontier(simulator, rows, searched, studies)
    first = simulator.forecast("as planned", plan, studies)
    reaching = [row for row in frontier if wanted is not None and row.width is not None and row.width <= wanted]
    cheapest = next((row for row in reaching if row.hours <= (budget or np.inf)), None)
    return DesignForecast(
        campaign=campaign,
        baseline=arms[0],
        challenger=arms[1],
        studies=studies,
        margin=margin,
        family=family,
        laws=laws,
        noise=noise,
        lost=lost,
        rungs=[points[k].name for k in own],
        forecasts=forecasts(found, truth, at, margin=margin),
        target_rung=points[own[-1]].name,
        plan=first,
        changed=[simulator.forecast(name, seeds, studies) for name, seeds in changed.items()],
        searched=rows,
        frontier=frontier,
        wanted=wanted,
        budget=budget,
        cheapest=cheapest,
        verdict=_verdict(frontier, cheapest, wanted, budget, points[own[-1]].name),
        assumptions=_assumptions(laws, noise, family, lost, len(whole.flops)),
    )


def _frontier(
    simulator: _Simulator, rows: list[PlanForecast], searched: Sequence[Sequence[int]], studies: int
) -> list[PlanForecast]:
    """Plans narrower than every cheaper one, by rising cost, each simulated in full."""
    best = np.inf
    kept: list[PlanForecast] = []
    for number in sorted(range(len(rows)), key=lambda k: rows[k].hours):
        width = rows[number].width
        if width is None or width >= best * SCREENING_MARGIN:
            continue
        best = min(best, width)
        row = simulator.forecast("", searched[number], studies)
        if row.width is not None and (not kept or row.width < (kept[-1].width or 0.0)):
            kept.append(row)
    return kept


def _verdict(
    frontier: list[PlanForecast], cheapest: PlanForecast | None, wanted: float | None, budget: float | None, rung: str
) -> list[str]:
    if wanted is None:
        return []
    within = f" within {budget:,.4g} hours" if budget is not None else ""
    if cheapest is not None:
        return [
            f"The cheapest plan that reaches a width of {wanted:g} at the loss of {rung}{within}: {cheapest.design}; "
            f"width {cheapest.width:.3f}, {cheapest.hours:,.3g} hours, {2 * cheapest.cells} runs."
        ]
    lines = [f"No plan of the search reaches a width of {wanted:g} at the loss of {rung}{within}."]
    reaching = [row for row in frontier if row.width is not None and row.width <= wanted]
    affordable = [row for row in frontier if budget is None or row.hours <= budget]
    if affordable:
        lines.append(f"The narrowest: {affordable[-1].design}, width {affordable[-1].width:.3f}.")
    elif frontier:
        lines.append(f"The cheapest that gives an interval at all takes {frontier[0].hours:,.3g} hours.")
    if reaching:
        row = reaching[0]
        lines.append(f"Reached by: {row.design}; {row.hours:,.3g} hours, width {row.width:.3f}.")
    elif frontier and frontier[-1].width is not None:
        factor = (frontier[-1].width / wanted) ** 2
        lines.append(
            f"Reached by about {factor:.1f} times the seeds of {frontier[-1].design} "
            f"({frontier[-1].hours * factor:,.3g} hours), or noise {frontier[-1].width / wanted:.1f} times smaller."
        )
    return lines


def _assumptions(laws: Laws, noise: Noise, family: str, lost: float, cells: int) -> list[str]:
    lines = [
        f"Assumed laws: {laws.source}.",
        f"Assumed noise of ln loss: {noise.cell:.4f} shared by a cell, {noise.difference:.4f} in the difference of its arms: "
        f"{noise.source}.",
        f"Assumed: {lost:.1%} of runs lost; analysed with {LAW_FAMILIES[family].label}. A fit chooses its family by rungs "
        "left out; where it chooses another, the width is that one's.",
    ]
    return (
        [*lines, f"{BOOTSTRAP_REMARK[0].upper()}{BOOTSTRAP_REMARK[1:]}."] if cells > MAX_CELLS_FOR_T_INTERVAL else lines
    )


def laws_of(study: Study, arms: tuple[str, str], name: str) -> Laws:
    """The laws that a study fitted, as assumed laws; a `UserError` where it does not compare these arms."""
    for found in study.comparisons:
        if (found.baseline, found.challenger) == arms:
            one, two = found.fits[arms[0]], found.fits[arms[1]]
            ends = [end for fit in (one, two) for end in fit.compute_range]
            return Laws(
                baseline=one.law,
                challenger=two.law,
                source=f"{name}, family {found.family}",
                around=float(np.sqrt(min(ends) * max(ends))) * FLOPS_PER_PFLOPS_DAY,
                family=found.family if LAW_FAMILIES[found.family].design == "ladder" else None,
            )
    pairs = ", ".join(f"{found.challenger} against {found.baseline}" for found in study.comparisons)
    raise UserError(
        f"--law {name}: it compares {pairs}, and the campaign {arms[1]} against {arms[0]}. Fit those arms, or name the "
        "arms with --baseline and --challenger."
    )
