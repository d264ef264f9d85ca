"""The forecast of a campaign: its plan, the plan with one thing changed, and the designs that are narrowest for their cost.

Designs come in as seeds over a list of points and are compared at one loss, that of the challenger at the largest planned
rung: dropping that rung then shows what extrapolating to it would cost.
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

SCREENED = 150
"""Studies by which a design of the search is judged before the best get as many as the plan."""

CLOSE = 1.15
"""A design is simulated in full where its screened width is within this factor of the frontier."""

Point = tuple[str, float, float, float, float, bool]
"""Name, parameters, tokens, FLOPs, GPU-hours of one seed of both arms, whether the campaign has it."""


class Row(Strict, frozen=True):
    """One design at the target loss."""

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
    """What a campaign would find out."""

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
    """Whose losses the forecasts are at: the challenger's at each planned rung."""
    forecasts: list[Forecast]
    target_rung: str
    plan: Row
    changed: list[Row]
    searched: list[Row]
    """Every design of the search, by rising cost."""
    frontier: list[Row]
    wanted: float | None
    budget: float | None
    cheapest: Row | None
    """The cheapest design that reaches the wanted width within the budget."""
    verdict: list[str]
    assumptions: list[str]


class _Bench(NamedTuple):
    """What all simulations of one forecast share."""

    points: Sequence[Point]
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

    def row(self, name: str, seeds: Sequence[int], studies: int) -> Row:
        """One design, simulated."""
        which = np.repeat(np.arange(len(self.points)), seeds).astype(np.intp)
        hours = sum(point[4] * count for point, count in zip(self.points, seeds, strict=True))
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
            pass  # too few cells for the family: no interval, which is what the row says
        else:
            one = forecasts(found, self.truth, self.target, margin=self.margin)[0]
            width, excludes = one.width, one.excludes
            bias = one.bias
        self.simulated(studies)
        return Row(
            name=name,
            design=", ".join(
                f"{point[0]}{f' x{count}' if count > 1 else ''}"
                for point, count in zip(self.points, seeds, strict=True)
                if count
            ),
            cells=int(sum(seeds)),
            hours=float(hours),
            width=width,
            excludes=excludes,
            bias=bias,
        )


def forecast(
    *,
    campaign: str,
    arms: tuple[str, str],
    points: Sequence[Point],
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
    """The forecast of a plan and of what could stand in its place.

    Args:
        campaign: Its name.
        arms: Baseline and challenger.
        points: Sizes with their budgets, by rising compute.
        plan: Seeds at each point.
        changed: Plans with one thing changed, by name.
        searched: Designs among which the cheapest is looked for.
        laws: Assumed.
        noise: Assumed.
        family: Row of ``analysis.fitting.families.LAW_FAMILIES``; without it the one that the laws were fitted with, else
            ``lines``, or ``shared-floor`` where the laws have a floor.
        lost: Chance that a run gives no loss.
        margin: Ratio that the interval is to leave out.
        wanted: Width that is looked for.
        budget: Most GPU-hours.
        studies: Of the plan, its changes and the designs on the frontier.
        seed: Of the noise.
        progress: Takes the share of the work that is done, 0 to 1, after each design.

    Raises:
        UserError: The plan has too few cells for the family.
    """
    cells = PlannedCells(*(np.array([point[k] for point in points], dtype=np.float64) for k in (1, 2, 3)))
    truth = Truth(laws, cells)
    family = family or laws.family or ("shared-floor" if laws.has_floor else "lines")
    own = [at for at, count in enumerate(plan) if count]
    at = truth.loss(cells.flops[own], 1)
    # How many designs of the search come to the frontier is not known before; a tenth of them is usual.
    total = len(searched) * (min(SCREENED, studies) + 0.1 * studies) + (1 + len(changed)) * studies
    done = 0

    def simulated(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done / total, 1.0))

    bench = _Bench(points, cells, truth, noise, at[-1:], family, lost, margin, seed, simulated)
    whole = cells.take(np.repeat(np.arange(len(points)), plan).astype(np.intp))
    found = simulate(whole, truth, noise, at, family=family, lost=lost, studies=studies, seed=seed)
    rows = [bench.row("", seeds, min(SCREENED, studies)) for seeds in searched]
    frontier = _frontier(bench, rows, searched, studies)
    first = bench.row("as planned", plan, studies)
    cheapest = next(
        (
            row
            for row in frontier
            if wanted is not None and row.width is not None and row.width <= wanted and row.hours <= (budget or np.inf)
        ),
        None,
    )
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
        rungs=[points[k][0] for k in own],
        forecasts=forecasts(found, truth, at, margin=margin),
        target_rung=points[own[-1]][0],
        plan=first,
        changed=[bench.row(name, seeds, studies) for name, seeds in changed.items()],
        searched=rows,
        frontier=frontier,
        wanted=wanted,
        budget=budget,
        cheapest=cheapest,
        verdict=_verdict(frontier, cheapest, wanted, budget, points[own[-1]][0]),
        assumptions=_assumptions(laws, noise, family, lost, len(whole.flops)),
    )


def _frontier(bench: _Bench, rows: list[Row], searched: Sequence[Sequence[int]], studies: int) -> list[Row]:
    """Designs that no cheaper one is as narrow as, by rising cost, each simulated in full."""
    best = np.inf
    again = []
    for number in sorted(range(len(rows)), key=lambda k: rows[k].hours):
        width = rows[number].width
        if width is not None and width < best * CLOSE:
            again.append(number)
            best = min(best, width)
    full = [bench.row("", searched[number], studies) for number in again]
    kept: list[Row] = []
    for row in full:
        if row.width is not None and (not kept or row.width < (kept[-1].width or 0.0)):
            kept.append(row)
    return kept


def _verdict(
    frontier: list[Row], cheapest: Row | None, wanted: float | None, budget: float | None, rung: str
) -> list[str]:
    if wanted is None:
        return []
    within = f" within {budget:,.4g} hours" if budget is not None else ""
    if cheapest is not None:
        return [
            f"The cheapest design that reaches a width of {wanted:g} at the loss of {rung}{within}: {cheapest.design}; "
            f"width {cheapest.width:.3f}, {cheapest.hours:,.3g} hours, {2 * cheapest.cells} runs."
        ]
    lines = [f"No design of the search reaches a width of {wanted:g} at the loss of {rung}{within}."]
    reaching = [row for row in frontier if row.width is not None and row.width <= wanted]
    affordable = [row for row in frontier if budget is None or row.hours <= budget]
    if affordable:
        lines.append(f"The narrowest there is: {affordable[-1].design}, width {affordable[-1].width:.3f}.")
    elif frontier:
        lines.append(f"The cheapest that gives an interval at all takes {frontier[0].hours:,.3g} hours.")
    if reaching:
        row = reaching[0]
        lines.append(f"What would: {row.design}; {row.hours:,.3g} hours, width {row.width:.3f}.")
    elif frontier and frontier[-1].width is not None:
        factor = (frontier[-1].width / wanted) ** 2
        lines.append(
            f"What would: about {factor:.1f} times the seeds of {frontier[-1].design} "
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
    """The laws of a study of one's own.

    Raises:
        UserError: It does not compare these arms.
    """
    for found in study.comparisons:
        if (found.baseline, found.challenger) == arms:
            one, two = found.fits[arms[0]], found.fits[arms[1]]
            ends = [end for fit in (one, two) for end in fit.compute_range]
            return Laws(
                baseline=one.law,
                challenger=two.law,
                source=f"{name}, family {found.family}",
                around=float(np.sqrt(min(ends) * max(ends))) * 8.64e19,
                family=found.family if LAW_FAMILIES[found.family].design == "ladder" else None,
            )
    told = ", ".join(f"{found.challenger} against {found.baseline}" for found in study.comparisons)
    raise UserError(
        f"--law {name}: it compares {told}, and the campaign {arms[1]} against {arms[0]}. Fit those arms, or name the "
        "arms with --baseline and --challenger."
    )
