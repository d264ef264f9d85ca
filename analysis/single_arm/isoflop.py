"""Approaches 1 and 2 of Hoffmann et al. 2022: envelope and valleys, so that old papers can be reproduced.

Both stand beside approach 3 (the surface), never in its place: a parabola through a valley that is not one puts the
optimum elsewhere (Czech et al. 2026, arXiv:2603.22339: 3 % to 33 % in parameters, without any noise), and grids that
drift off centre do worse. `valley_bias` works that out for the surface at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, Rows, select
from analysis.data.table import RunsTable, check_table
from analysis.fitting.fit import Status, judge, solve
from analysis.fitting.laws import LAWS, LossSurface
from scaling.errors import UserError
from scaling.io import Strict
from scaling.power_rule import PowerRule, fit_power_rule

if TYPE_CHECKING:
    import pandas as pd


SAME_BUDGET = 0.08
"""Relative distance of computes that belong to one isoFLOP profile."""

LEFT_OUT_REASONS = {
    "edge": "the best run is the smallest or the largest tried",
    "outside": "the parabola's minimum lies beyond the runs",
    "no minimum": "the parabola bends down",
}


class Valley(Strict, frozen=True):
    """One isoFLOP profile and the parabola through it, in ln N."""

    flops: float
    params: list[float]
    losses: list[float]
    params_optimal: float | None
    """At the parabola's minimum; None where it has none."""
    tokens_optimal: float | None
    loss_optimal: float | None
    curvature: float
    """Half the second derivative of loss in ln N."""
    position: Literal["interior", "edge", "outside", "no minimum"]
    """Edge: the best run is the smallest or largest tried. Outside: the minimum lies beyond all runs."""
    off_centre: float | None
    """ln of the minimum over the grid's centre; far from 0 the parabola leans."""


class Allocations(Strict, frozen=True):
    """Growth of the optimal parameters and tokens with compute, by the three approaches."""

    arm: str
    valleys: list[Valley]
    left_out: list[str]
    """Profiles that the rules leave out, and why."""
    envelope: dict[str, PowerRule] | None
    """Approach 1, ``params`` and ``tokens``: the lower envelope over runs; None without enough overlap."""
    parabolas: dict[str, PowerRule] | None
    """Approach 2; None with fewer than two interior valleys."""
    surface: LossSurface
    """Approach 3."""
    surface_status: Status
    """Status of the surface fit; a ladder, where N and D rise together, does not identify one."""
    surface_exponent: float
    """Of params under approach 3: beta / (alpha + beta); means nothing unless the surface converged."""
    bias: float | None
    """ln of approach 2's optimal params over the truth, if the fitted surface were the truth: the mean over profiles."""
    remark: str


def allocations(table: RunsTable | pd.DataFrame, arm: str | None = None) -> Allocations:
    """The compute-optimal allocation of one arm by all three approaches.

    Raises:
        UserError: The arm is not known, or the runs are too few for a surface.
    """
    table = check_table(table)
    name, arm = table.name, table.only_arm(arm)
    rows = select(table, (arm,), ends_only=False).rows
    form = LAWS["surface"]
    if len(rows.loss) < form.size:
        raise UserError(
            f"{name}: arm {arm} has {len(rows.loss)} runs, and the surface has {form.size} parameters. Add runs."
        )
    fitted = solve(form, rows, form.objective)
    surface, status = fitted.law(), judge(fitted)[0]
    if not isinstance(surface, LossSurface):
        raise TypeError(surface)
    found = valleys(rows)
    interior = [valley for valley in found if valley.position == "interior"]
    left_out = [f"{v.flops:.3g} FLOPs: {LEFT_OUT_REASONS[v.position]}" for v in found if v.position != "interior"]
    flops = np.array([valley.flops for valley in interior])
    optimal = np.array([valley.params_optimal for valley in interior], dtype=np.float64)
    return Allocations(
        arm=arm,
        valleys=found,
        left_out=left_out,
        envelope=envelope(rows),
        parabolas=_rules(flops, optimal) if len(interior) >= 2 else None,
        surface=surface,
        surface_status=status,
        surface_exponent=surface.beta / (surface.alpha + surface.beta),
        bias=valley_bias(surface, interior) if interior else None,
        remark=""
        if len(interior) >= 2
        else "Fewer than two profiles have an interior minimum: approach 2 says nothing.",
    )


def profiles(flops: Array) -> list[NDArray[np.intp]]:
    """Rows of each isoFLOP profile, by rising compute: at least four runs within 8 % of one compute."""
    order = np.argsort(flops, kind="stable")
    logs = np.log(flops[order])
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or logs[end] - logs[start] > SAME_BUDGET:
            if end - start >= 4:
                groups.append(order[start:end])
            start = end
    return groups


def valleys(rows: Rows) -> list[Valley]:
    """The parabolas of all profiles."""
    found = []
    for group in profiles(rows.columns["flops"]):
        group = group[np.argsort(rows.columns["params"][group], kind="stable")]
        params, losses = rows.columns["params"][group], rows.loss[group]
        x = np.log(params)
        if len(np.unique(np.round(x, 3))) < 4:
            continue
        flops = float(np.exp(np.log(rows.columns["flops"][group]).mean()))
        centre = float(x.mean())
        curvature, slope, level = np.polyfit(x - centre, losses, 2)
        best = int(np.argmin(losses))
        at = None if curvature <= 0 else centre - slope / (2 * curvature)
        if at is None:
            place = "no minimum"
        else:
            place = "outside" if not x[0] < at < x[-1] else "edge" if best in (0, len(x) - 1) else "interior"
        kept = None if at is None else float(np.exp(at))
        found.append(
            Valley(
                flops=flops,
                params=params.tolist(),
                losses=losses.tolist(),
                params_optimal=kept,
                tokens_optimal=None if kept is None else flops / 6.0 / kept,
                loss_optimal=None if at is None else float(level - slope**2 / (4 * curvature)),
                curvature=float(curvature),
                position=place,  # type: ignore[arg-type]
                off_centre=None if at is None else float(at - 0.5 * (x[0] + x[-1])),
            )
        )
    return found


def _rules(flops: Array, params: Array) -> dict[str, PowerRule]:
    return {"params": fit_power_rule(flops, params), "tokens": fit_power_rule(flops, flops / 6.0 / params)}


def envelope(rows: Rows, *, points: int = 1500) -> dict[str, PowerRule] | None:
    """Approach 1: at each compute the run with the lowest loss, runs of one size joined by lines in ln C and ln L.

    None where fewer than three sizes take their turn on the envelope.
    """
    flops, params = rows.columns["flops"], rows.columns["params"]
    sizes = np.round(np.log(params), 2)
    grid = np.linspace(np.log(flops.min()), np.log(flops.max()), points)
    best = np.full(points, np.inf)
    winner = np.full(points, np.nan)
    for size in np.unique(sizes):
        own = np.flatnonzero(sizes == size)
        own = own[np.argsort(flops[own], kind="stable")]
        x = np.log(flops[own])
        if len(np.unique(x)) < 2:
            continue
        curve = np.interp(grid, x, np.log(rows.loss[own]), left=np.inf, right=np.inf)
        lower = curve < best
        best[lower], winner[lower] = curve[lower], params[own].mean()
    used = np.isfinite(best)
    turns = np.unique(winner[used])
    if len(turns) < 3:
        return None
    # One point for each size that takes a turn: the middle of its stretch, so that dense grids fake no certainty.
    middle = np.array([grid[used & (winner == size)].mean() for size in turns])
    return _rules(np.exp(middle), turns)


def valley_bias(surface: LossSurface, interior: list[Valley]) -> float:
    """Bias of the parabolas on these grids, for this surface without noise: mean ln(found / true) of params."""
    off = []
    for valley in interior:
        params = np.array(valley.params)
        x = np.log(params)
        losses = surface.loss(params, valley.flops / 6.0 / params)
        curvature, slope, _ = np.polyfit(x - x.mean(), losses, 2)
        off.append(x.mean() - slope / (2 * curvature) - np.log(surface.optimum(valley.flops).params))
    return float(np.mean(off))


def allocations_text(found: Allocations) -> str:
    """The three approaches as lines for the terminal."""
    lines = [f"{found.arm}: optimal parameters grow as C^a"]
    for label, rules in (("approach 1 (envelope)", found.envelope), ("approach 2 (valleys)", found.parabolas)):
        if rules is None:
            lines.append(f"  {label}: the runs do not carry it")
        else:
            rule = rules["params"]
            error = "" if rule.error is None else f" +- {rule.error:.3f}"
            lines.append(f"  {label}: a = {rule.exponent:.3f}{error} from {rule.points} points")
    carried = found.surface_status == "converged"
    answer = f"a = {found.surface_exponent:.3f}" if carried else f"the runs do not carry it ({found.surface_status})"
    lines.append(f"  approach 3 (surface): {answer}")
    if found.bias is not None and carried:
        lines.append(
            f"  known bias of approach 2 on this surface and these grids: {np.expm1(found.bias):+.1%} in parameters"
        )
    lines += [f"  left out: {reason}" for reason in found.left_out]
    return "\n".join(lines + ([f"  {found.remark}"] if found.remark else []))
