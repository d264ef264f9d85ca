"""A law fitted to runs: the value, what it was fitted to, and a certificate that it is the minimum.

Peers report success on answers that are not minima (the residual error of default tolerances, one start, a mean in
place of a sum). A fit here says how it was made, how many starts agree, and how far from stationary the answer is.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, LeftOut, Rows
from analysis.fitting.laws import LAWS, Law, LawForm
from analysis.fitting.parameterization import Parameterization, Sharing, parameterize
from analysis.fitting.solver import Problem, Solution, Space, minimise, objective, predict, residuals
from scaling.errors import UserError, unknown_name
from scaling.io import Strict

Status = Literal["converged", "at_bound", "not_identified", "failed"]
LossFunction = Literal["least-squares", "huber", "absolute"]

HUBER_DELTA = 1e-3
"""On log loss: the field's convention for surfaces (Hoffmann et al. 2022, sec. D.2)."""


SEARCH = 50
"""Newton steps that every start gets; starts that creep along a flat floor end here, the best one is followed on."""


SEARCH_ROWS = 2000
"""Rows that the search over starts looks at; more are thinned for it."""


class Objective(Strict, frozen=True):
    """What a fit minimises, summed over rows."""

    function: LossFunction = "least-squares"
    space: Space = "log"
    """Residuals of ln loss, or of the loss itself in nats."""
    delta: float | None = None
    """Huber's threshold in units of the residual."""

    def __post_init__(self) -> None:
        """Refuse a threshold without Huber and Huber without a threshold."""
        if (self.function == "huber") != (self.delta is not None):
            raise UserError(
                f'the loss function "{self.function}" {"needs" if self.function == "huber" else "does not take"} a '
                f"delta; give one with huber alone, {HUBER_DELTA:g} on log loss being the field's."
            )

    def describe(self) -> str:
        """The words a caption uses."""
        names = {"least-squares": "least squares", "absolute": "least absolute deviations"}
        name = names.get(self.function, f"Huber, delta {self.delta:g}," if self.delta else "")
        return f"{name} on {'log loss' if self.space == 'log' else 'loss'}"


LEAST_SQUARES = Objective(function="least-squares", space="loss")
"""Unweighted, in loss space: what Moonlight's drawn lines are."""
HUBER = Objective(function="huber", space="log", delta=HUBER_DELTA)


EFFICIENT = 1.345
"""Huber's threshold in standard deviations: 95 % efficient where errors are normal (Huber 1964)."""


def tied_to_scale(form: LawForm, rows: Rows) -> Objective:
    """Huber on log loss with its threshold tied to the residuals' own scale instead of the field's constant.

    The scale is the median absolute deviation of the residuals of the conventional fit, as a standard deviation.
    """
    r = solve(form, rows, HUBER, best_of=4).log_residuals()
    scale = float(np.median(np.abs(r - np.median(r)))) / 0.6745
    return Objective(function="huber", delta=max(EFFICIENT * scale, 1e-12))


class Certificate(Strict, frozen=True):
    """Evidence that an answer is the minimum."""

    objective: float
    """Sum over rows."""
    gradient: float
    """Largest component in centred parameters, per row and relative to the root of the objective."""
    gap: float
    """What one more Newton step promises to gain, relative to the objective."""
    starts: int
    agreeing: float
    """Share of the starts that ended within 1e-6 of the lowest objective."""
    iterations: int


class Fit(Strict, frozen=True):
    """A law fitted to one arm."""

    arm: str
    form: str
    """Row of ``analysis.fitting.laws.LAWS``."""
    law: Law
    objective: Objective
    status: Status
    remark: str
    """Why the status is what it is, in a sentence; empty where it converged."""
    certificate: Certificate
    points: int
    rows: list[int]
    """Rows of the table that were used; the first data row is 1."""
    residuals: list[float]
    """ln(observed / fitted), in the order of `rows`."""
    compute_range: tuple[float, float]
    """Least and greatest compute of the points, PFLOP/s-days."""
    loss_range: tuple[float, float]

    @property
    def rms(self) -> float:
        """Root mean square of the log residuals: a typical relative error of the loss."""
        return float(np.sqrt(np.mean(np.square(self.residuals))))


class Fitted(NamedTuple):
    """The inside of a fit, for intervals: design, problem, minimum."""

    design: Parameterization
    problem: Problem
    theta: Array
    certificate: Certificate

    def law(self, arm: int = 0, theta: Array | None = None) -> Law:
        """The law of one arm."""
        return self.design.law(self.theta if theta is None else theta, arm)

    def log_residuals(self) -> Array:
        """ln(observed / fitted) of every row."""
        return np.asarray(np.log(self.problem.loss) - predict(self.problem, self.theta[None])[0][0])


def form_named(name: str) -> LawForm:
    """The row of `LAWS`.

    Raises:
        UserError: There is none.
    """
    if name not in LAWS:
        raise UserError(unknown_name("law", name, LAWS))
    return LAWS[name]


def some_of(rows: int, most: int) -> NDArray[np.intp]:
    """Row numbers: all of fewer than twice `most`, else `most` at random. Every n-th row could be one arm alone."""
    if rows < 2 * most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))


def solve(
    form: LawForm,
    rows: Rows,
    objective_: Objective,
    *,
    arms: int = 1,
    sharing: Sharing | None = None,
    best_of: int | None = None,
) -> Fitted:
    """The global minimum of a form, or of a family over arms.

    Args:
        form: Terms of the law.
        rows: What is fitted.
        objective_: Loss function and space.
        arms: How many arms the rows number.
        sharing: What the arms share; nothing when not given.
        best_of: Follow only so many of the starts, the lowest; all when not given.
    """
    plan = parameterize(form, rows, arms=arms, sharing=sharing)
    delta = {"huber": objective_.delta, "least-squares": None, "absolute": HUBER_DELTA}[objective_.function]
    problem = plan.problem(rows, space=objective_.space, delta=delta)
    thin = some_of(len(rows.loss), SEARCH_ROWS)
    starts = plan.starts(rows.take(thin))
    # Among many rows the right valley shows in a part of them; the last descent uses all.
    searched = problem if len(thin) == len(rows.loss) else problem._replace(z=problem.z[thin], loss=problem.loss[thin])
    if best_of is not None and best_of < len(starts):
        starts = starts[np.argsort(objective(searched, starts), kind="stable")[:best_of]]
    found = minimise(searched, starts, limit=SEARCH)
    best = int(np.nanargmin(found.objective))
    last = minimise(problem, found.theta[best]) if found.gap[best] > 1e-9 or searched is not problem else None
    theta = found.theta[best] if last is None else last.theta[0]
    certificate = _certificate(found, best, last)
    if objective_.function == "absolute":
        from analysis.fitting.least_absolute import least_absolute

        theta, certificate = least_absolute(problem, theta, certificate)
    return Fitted(plan, problem, theta, certificate)


def _certificate(found: Solution, best: int, last: Solution | None) -> Certificate:
    end, at = (found, best) if last is None else (last, 0)
    lowest = float(end.objective[at])
    agreeing = np.mean(found.objective <= float(found.objective[best]) * (1.0 + 1e-6) + 1e-18)
    return Certificate(
        objective=lowest,
        gradient=float(end.gradient[at]),
        gap=float(end.gap[at]),
        starts=len(found.objective),
        agreeing=float(agreeing),
        iterations=found.iterations + (last.iterations if last else 0),
    )


def fit_law(
    name: str,
    rows: Rows,
    *,
    arm: str,
    numbers: list[int] | None = None,
    objective: Objective | None = None,
    best_of: int | None = None,
) -> Fit:
    """A form of `LAWS` fitted to the runs of one arm.

    Args:
        name: Row of `LAWS`.
        rows: Runs of one arm.
        arm: Its name, for the answer.
        numbers: Row numbers in the table; 1, 2, ... when not given.
        objective: Least squares in loss space for laws of compute, Huber on log loss for the surface.
        best_of: Follow only so many starts.

    Raises:
        UserError: There is no such form, or there are fewer runs than parameters.
    """
    form = form_named(name)
    rows = rows._replace(arm=np.zeros(len(rows.loss), dtype=np.intp))
    if len(rows.loss) < form.size:
        raise UserError(
            f"{arm}: {len(rows.loss)} runs, and {form.label} has {form.size} parameters. Fit a law with fewer "
            "(power has 2), or finish more runs."
        )
    objective = objective or (HUBER if name == "surface" else LEAST_SQUARES)
    fitted = solve(form, rows, objective, best_of=best_of)
    return describe(fitted, name, rows, arm=arm, numbers=numbers, objective=objective)


def describe(
    fitted: Fitted,
    name: str,
    rows: Rows,
    *,
    arm: str,
    number: int = 0,
    numbers: list[int] | None = None,
    objective: Objective,
) -> Fit:
    """The public value of one arm of a fitted design."""
    from scaling.units import pflops_days

    own = np.flatnonzero(rows.arm == number)
    numbers = numbers if numbers is not None else [int(row) + 1 for row in own]
    status, remark = judge(fitted, name)
    flops, loss = rows.columns["flops"][own], rows.loss[own]
    return Fit(
        arm=arm,
        form=name,
        law=fitted.law(number),
        objective=objective,
        status=status,
        remark=f"{arm}: {remark}" if remark else "",
        certificate=fitted.certificate,
        points=len(own),
        rows=numbers,
        residuals=[float(value) for value in fitted.log_residuals()[own]],
        compute_range=(pflops_days(float(flops.min())), pflops_days(float(flops.max()))),
        loss_range=(float(loss.min()), float(loss.max())),
    )


def judge(fitted: Fitted, name: str) -> tuple[Status, str]:
    """Whether an answer is one, and a sentence where it is not."""
    plan, problem, theta = fitted.design, fitted.problem, fitted.theta
    exponents = np.array([value for slot, value in zip(plan.slots, theta, strict=True) if slot.column])
    if not np.all(np.isfinite(theta)):
        return "failed", "the search left the numbers that can be represented; no law of this form fits."
    if np.any(exponents <= 0.0):
        worst = float(exponents.min())
        return "at_bound", f"an exponent is {worst:.3g}: loss does not fall with it, so the law predicts nothing."
    floor = [j for j, slot in enumerate(plan.slots) if slot.column is None and not plan.form.terms[slot.term]]
    if any(np.exp(theta[j]) < 1e-4 * problem.loss.min() for j in floor):
        return "at_bound", "the floor ends at 0: these runs ask for none. Use the law without a floor."
    if not fitted.certificate.gap <= 1e-6:  # a gap that is no number is no minimum either
        return "failed", f"the search stopped {fitted.certificate.gap:.1g} of the objective above a minimum."
    if name == "surface" and _moves_together(fitted):
        return "not_identified", (
            "parameters and tokens move together in these runs, so nothing tells what either does alone. Use a law of "
            "compute, or add runs that split the same compute otherwise."
        )
    if floor:
        low, high = floor_range(fitted, floor[0])
        if low <= 0.0 and name == "power-floor":
            return "not_identified", (
                f"floors from 0 to {high:.2f} nats fit these {len(problem.loss)} runs equally well "
                "(95 %); neither floor nor exponent is identified."
            )
    return "converged", ""


TOGETHER = 1e-4
"""Share of the spread of ln D that ln N leaves unexplained, up to which the two count as one: about 1 % of scatter."""


def _moves_together(fitted: Fitted) -> bool:
    params, tokens = (np.asarray(fitted.problem.z[:, j]) for j, slot in enumerate(fitted.design.slots) if slot.column)
    params, tokens = params - params.mean(), tokens - tokens.mean()
    # Products and no quotient: sizes that are all the same have no spread, and leave nothing unexplained either.
    spread = float(params @ params) * float(tokens @ tokens)
    return spread - float(params @ tokens) ** 2 <= max(TOGETHER * spread, 1e-20)


__all__ = [
    "HUBER",
    "LEAST_SQUARES",
    "Certificate",
    "Fit",
    "Fitted",
    "LeftOut",
    "Objective",
    "Status",
    "describe",
    "fit_law",
    "form_named",
    "judge",
    "residuals",
    "solve",
    "tied_to_scale",
]

STEPS = 25


def floor_range(fitted: Fitted, position: int, *, level: float = 0.95) -> tuple[float, float]:
    """Floors whose best fit is not rejected against the best of all (F test on the profile), in nats.

    Args:
        fitted: A fit with a floor.
        position: Where the floor's logarithm stands among the parameters.
        level: Confidence.

    Returns:
        Lowest and highest floor; the lowest is 0 where a law without floor fits about as well.
    """
    from scipy.special import fdtri

    problem, theta = fitted.problem, fitted.theta
    freedom = len(problem.loss) - len(theta)
    top = float(problem.loss.min())
    if freedom < 1:
        return 0.0, top
    allowed = fitted.certificate.objective * (1.0 + float(fdtri(1, freedom, level)) / freedom)
    shares = np.concatenate([[1e-9], np.linspace(0.0, 1.0, STEPS + 1)[1:-1], [0.999]])
    start = np.repeat(theta[None], len(shares), axis=0)
    start[:, position] = np.log(shares * top)
    free = np.arange(len(theta)) != position
    within = shares[minimise(problem, start, free=free).objective <= allowed] * top
    best = float(np.exp(theta[position]))
    low, high = min([best, *within]), max([best, *within])
    return (0.0 if low <= 1e-6 * top else float(low)), float(high)
