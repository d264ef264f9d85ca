"""Experiment designs near a campaign: rungs, seeds and cost of each.

A design chooses points (a size with its budget, trained by both arms) and the seeds at each. Points are the campaign's
rungs, and two smaller and one larger size at the ladder's own step, whose hours are extrapolated. The precision of a
design is predicted by `analysis.power.simulate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.units import human
from sweeps.planning.cost import Cost
from sweeps.planning.plan import CampaignPlan, PlannedRun

SEEDS = (1, 2, 3, 5, 8)
"""Numbers of seeds at a rung that the search tries."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One size with its budget."""

    name: str
    params: float
    tokens: float
    flops: float
    """Convention ``6nd``."""
    hours: float
    """GPU-hours (on a CPU: hours of a run) of one seed, both arms."""
    planned: bool
    """True for a rung of the campaign; False for an extrapolated one."""


class CampaignDesign(msgspec.Struct, frozen=True, kw_only=True):
    """Seeds at each point, and a name."""

    name: str
    seeds: tuple[int, ...]
    """Number of seeds at each point of its list; 0 leaves the point out."""

    def hours(self, points: list[Point]) -> float:
        """GPU-hours of all its runs."""
        return sum(point.hours * seeds for point, seeds in zip(points, self.seeds, strict=True))

    def describe(self, points: list[Point]) -> str:
        """The rungs, with the number of seeds where it is more than one."""
        chosen = [(point.name, seeds) for point, seeds in zip(points, self.seeds, strict=True) if seeds]
        return ", ".join(name + (f" x{seeds}" if seeds > 1 else "") for name, seeds in chosen)


def two_arms(plan: CampaignPlan, baseline: str | None, challenger: str | None) -> tuple[str, str]:
    """The compared arms: by default the baseline is ``adamw`` or the first arm, the challenger the next one.

    Raises:
        ConfigError: An arm is unknown, or there are fewer than two.
    """
    arms = [arm.name for arm in plan.campaign.arms]
    for what, arm in (("baseline", baseline), ("challenger", challenger)):
        if arm is not None and arm not in arms:
            raise ConfigError(f"{plan.campaign.file}: {unknown_name(what, arm, arms)}")
    first = baseline or ("adamw" if "adamw" in arms and challenger != "adamw" else arms[0])
    second = challenger or next((arm for arm in arms if arm != first), None)
    if second is None or second == first:
        raise ConfigError(
            f"{plan.campaign.file}, [[arms]]: found {', '.join(arms)}; a ratio needs two different arms. Add the other one."
        )
    return first, second


def points_of(
    plan: CampaignPlan, costs: Mapping[str, Cost], arms: tuple[str, str]
) -> tuple[list[Point], CampaignDesign]:
    """All points by rising compute, and the campaign's own design.

    Raises:
        ConfigError: Two rungs have the same compute, as in an isoFLOP profile, or there is one rung only.
    """
    runs: dict[str, dict[tuple[str, int], PlannedRun]] = {}
    for run in plan.runs:
        if run.arm in arms:
            runs.setdefault(run.rung, {})[run.arm, run.seed] = run
    found: list[tuple[Point, int]] = []
    for rung, cell in runs.items():
        numbers = sorted({seed for _, seed in cell})
        base = cell[arms[0], numbers[0]]
        point = Point(
            name=rung,
            params=float(base.parameters),
            tokens=float(base.spec.budget.tokens),
            flops=float(base.spec.budget.flops),
            hours=sum(costs[run.id].gpu_hours for run in cell.values()) / len(numbers),
            planned=True,
        )
        found.append((point, len(numbers)))
    found.sort(key=lambda pair: pair[0].flops)
    points, seeds = [point for point, _ in found], tuple(count for _, count in found)
    for one, two in itertools.pairwise(points):
        if two.flops < one.flops * 1.02:
            raise ConfigError(
                f"{plan.campaign.file}: rungs {one.name} and {two.name} have nearly the same compute, as in an isoFLOP "
                "profile. Designs are simulated for ladders, where each compute is spent one way; keep one of the two."
            )
    if len(points) < 2:
        raise ConfigError(
            f"{plan.campaign.file}: a design needs several rungs, and the campaign has one. Add rungs: three or more."
        )
    smaller, larger = _beyond(points, down=True, count=2), _beyond(points, down=False, count=1)
    everything = [*reversed(smaller), *points, *larger]
    own = (0,) * len(smaller) + seeds + (0,) * len(larger)
    return everything, CampaignDesign(name="as planned", seeds=own)


def _beyond(points: list[Point], *, down: bool, count: int) -> list[Point]:
    """Points beyond an end, at the ladder's mean step and with the slope of its hours at that end."""
    end, inner = (points[0], points[1]) if down else (points[-1], points[-2])
    step = (points[-1].flops / points[0].flops) ** (1.0 / (len(points) - 1))
    share = math.log(points[-1].params / points[0].params) / math.log(points[-1].flops / points[0].flops)
    # Hours grow with compute; the slope is below 1 where small models leave the device idle.
    slope = math.log(end.hours / inner.hours) / math.log(end.flops / inner.flops)
    slope = min(max(slope, 0.3), 1.5)
    found = []
    for number in range(1, count + 1):
        factor = step ** (-number if down else number)
        params = end.params * factor**share
        found.append(
            Point(
                name=human(params),
                params=params,
                tokens=end.tokens * factor ** (1.0 - share),
                flops=end.flops * factor,
                hours=end.hours * factor**slope,
                planned=False,
            )
        )
    return found


def variants(points: list[Point], planned: CampaignDesign) -> list[CampaignDesign]:
    """The planned design with one change: a rung dropped or added, a seed more or less."""
    found = []
    for at, point in enumerate(points):
        planned_here = bool(planned.seeds[at])
        name = f"{'without' if planned_here else 'with'} {point.name}"
        found.append(_changed(planned, at, 0 if planned_here else 1, name))
    for at, point in enumerate(points):
        if planned.seeds[at]:
            found.append(_changed(planned, at, planned.seeds[at] + 1, f"one seed more at {point.name}"))
    more = tuple(seeds + 1 if seeds else 0 for seeds in planned.seeds)
    found.append(CampaignDesign(name="one seed more everywhere", seeds=more))
    fewer = tuple(max(seeds - 1, 1) if seeds else 0 for seeds in planned.seeds)
    if fewer != planned.seeds:
        found.append(CampaignDesign(name="one seed less where there are several", seeds=fewer))
    return [design for design in found if sum(seeds > 0 for seeds in design.seeds) >= 3]


def _changed(design: CampaignDesign, at: int, seeds: int, name: str) -> CampaignDesign:
    return CampaignDesign(name=name, seeds=(*design.seeds[:at], seeds, *design.seeds[at + 1 :]))


def candidates(points: list[Point]) -> list[CampaignDesign]:
    """Designs to simulate: three or more consecutive rungs, small ones with at least as many seeds as large ones.

    They reach at least the largest planned rung. A shorter ladder that extrapolates to it looks cheap in a simulation,
    because synthetic runs follow the fitted law exactly; real runs may not. Leaving out a middle rung saves little and
    hides curvature.
    """
    top = max(at for at, point in enumerate(points) if point.planned)
    unnamed = [CampaignDesign(name="", seeds=seeds) for seeds in set(_patterns(len(points), top))]
    kept = [msgspec.structs.replace(design, name=design.describe(points)) for design in unnamed]
    return sorted(kept, key=lambda design: (design.hours(points), design.seeds))


def _patterns(count: int, top_rung: int) -> Iterator[tuple[int, ...]]:
    for first, last in itertools.combinations(range(count), 2):
        length = last - first + 1
        if length < 3 or last < top_rung:
            continue
        for few, many in itertools.combinations_with_replacement(SEEDS, 2):
            for top in range(1, 2 if few == many else length):
                body = (many,) * (length - top) + (few,) * top
                yield (0,) * first + body + (0,) * (count - last - 1)
