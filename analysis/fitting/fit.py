"""Fits of a law to runs: many starts, the minimum, its certificate, and its status.

Other fitting code reports success at points that are no minima, because of default tolerances, a single start, or a mean
in place of a sum. A `Fit` therefore holds its objective, the share of starts that agree, and the distance from a
stationary point.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, Rows
from analysis.fitting.laws import LAWS, Law, LawForm
from analysis.fitting.objective import HUBER, HUBER_DELTA, Objective
from analysis.fitting.parameterization import Parameterization, Sharing, parameterize
from analysis.fitting.solver import Problem, minimise, objective, predict
from scaling.errors import UserError
from scaling.io import Strict
from scaling.units import pflops_days

Status = Literal["converged", "at_bound", "not_identified", "failed"]

SEARCH_STEPS = 50
"""Newton steps of each start; starts that creep along a flat floor end here, and only the best one is continued."""

MAX_SEARCH_ROWS = 2000
"""Rows of the search over starts; larger tables are sampled for it."""

EFFICIENT_DELTA = 1.345
"""Huber's threshold in standard deviations that is 95 % efficient for normal errors (Huber 1964)."""

SD_OF_MEDIAN_DEVIATION = 0.6745
"""Median absolute deviation of a standard normal distribution."""

MAX_COLLINEAR_SHARE = 1e-4
"""Share of the spread of one log column that another leaves unexplained, up to which the two are collinear: about 1 % of
scatter."""

PROFILE_STEPS = 25
"""Floors at which the profile likelihood is evaluated, between 0 and the smallest loss."""


def tied_to_scale(form: LawForm, rows: Rows) -> Objective:
    """Huber on log loss with its threshold tied to the residuals' own scale instead of the field's constant.

    The scale is the median absolute deviation of the residuals of the conventional fit, as a standard deviation.
    """
    # A few starts are enough: the scale of the residuals hardly depends on the last digits of the fit.
    r = solve(form, rows, HUBER, best_of=4).log_residuals()
    scale = float(np.median(np.abs(r - np.median(r)))) / SD_OF_MEDIAN_DEVIATION
    return Objective(function="huber", delta=max(EFFICIENT_DELTA * scale, 1e-12))


class Certificate(Strict, frozen=True):
    """Evidence that a point is the minimum."""

    objective: float
    """Sum over rows."""
    gradient: float
    """Largest component in centred parameters, per row and relative to the root of the objective."""
    gap: float
    """Predicted decrease of one more Newton step, relative to the objective."""
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
    """Sentence with the reason of the status; empty if converged."""
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


class Minimum(NamedTuple):
    """The minimum of a problem, from which laws and intervals are derived."""

    layout: Parameterization
    problem: Problem
    theta: Array
    """Shape ``(parameters,)``."""
    certificate: Certificate

    def law(self, arm: int = 0, theta: Array | None = None) -> Law:
        """The law of one arm."""
        return self.layout.law(self.theta if theta is None else theta, arm)

    def log_residuals(self) -> Array:
        """ln(observed / fitted) of every row."""
        return np.asarray(np.log(self.problem.loss) - predict(self.problem, self.theta[None])[0][0])


def sample_rows(rows: int, most: int) -> NDArray[np.intp]:
    """All row numbers up to twice `most`, else `most` at random; every n-th row could belong to one arm."""
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
) -> Minimum:
    """The global minimum of a form over one or several arms.

    Args:
        form: Terms of the law.
        rows: The data.
        objective_: Loss function and space.
        arms: Number of arms among the rows.
        sharing: Parameters that the arms share; none when not given.
        best_of: Continue only this many starts, those with the lowest objective; all when not given.
    """
    layout = parameterize(form, rows, arms=arms, sharing=sharing)
    # Least absolute deviations start at the minimum of Huber with the usual threshold, which is smooth.
    delta = {"huber": objective_.delta, "least-squares": None, "absolute": HUBER_DELTA}[objective_.function]
    problem = layout.problem(rows, space=objective_.space, delta=delta)
    thin = sample_rows(len(rows.loss), MAX_SEARCH_ROWS)
    # Large tables are searched in a sample; every start costs a pass over its rows in each step.
    starts = layout.starts(rows.take(thin))
    # A sample of many rows is enough to choose the basin; the last descent uses all rows.
    searched = problem if len(thin) == len(rows.loss) else problem._replace(z=problem.z[thin], loss=problem.loss[thin])
    # A start with a lower objective usually ends lower, so where many fits are made only the first few are continued.
    if best_of is not None and best_of < len(starts):
        starts = starts[np.argsort(objective(searched, starts), kind="stable")[:best_of]]
    found = minimise(searched, starts, limit=SEARCH_STEPS)
    # Starts that left the range of floats have a NaN objective.
    best = int(np.nanargmin(found.objective))
    # A best start that converged on all rows needs no last descent.
    last = minimise(problem, found.theta[best]) if found.gap[best] > 1e-9 or searched is not problem else None
    # Agreement is judged among the starts at the end of the search, the rest at the end of the last descent.
    end, at = (found, best) if last is None else (last, 0)
    theta = end.theta[at]
    certificate = Certificate(
        objective=float(end.objective[at]),
        gradient=float(end.gradient[at]),
        gap=float(end.gap[at]),
        starts=len(found.objective),
        agreeing=float(np.mean(found.objective <= float(found.objective[best]) * (1.0 + 1e-6) + 1e-18)),
        iterations=found.iterations + (last.iterations if last else 0),
    )
    if objective_.function == "absolute":
        from analysis.fitting.least_absolute import least_absolute

        theta, certificate = least_absolute(problem, theta, certificate)
    return Minimum(layout, problem, theta, certificate)


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
        arm: Its name.
        numbers: Row numbers in the table; 1, 2, ... when not given.
        objective: The form's own when not given.
        best_of: As in `solve`.

    Raises:
        UserError: There is no such form, or there are fewer runs than parameters.
    """
    form = LAWS.row(name)
    rows = rows._replace(arm=np.zeros(len(rows.loss), dtype=np.intp))
    if len(rows.loss) < form.size:
        raise UserError(
            f"{arm}: {len(rows.loss)} runs, and {form.label} has {form.size} parameters. Fit a law with fewer "
            "(power has 2), or finish more runs."
        )
    objective = objective or form.objective
    fitted = solve(form, rows, objective, best_of=best_of)
    return describe(fitted, name, rows, arm=arm, numbers=numbers, objective=objective)


def describe(
    fitted: Minimum,
    name: str,
    rows: Rows,
    *,
    arm: str,
    number: int = 0,
    numbers: list[int] | None = None,
    objective: Objective,
) -> Fit:
    """The `Fit` of one arm of a minimum over several."""
    own = np.flatnonzero(rows.arm == number)
    numbers = numbers if numbers is not None else [int(row) + 1 for row in own]
    status, remark = judge(fitted)
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


def judge(fitted: Minimum) -> tuple[Status, str]:
    """The status of a minimum, and the sentence with its reason."""
    layout, problem, theta = fitted.layout, fitted.problem, fitted.theta
    form = layout.form
    exponents = np.array([value for slot, value in zip(layout.slots, theta, strict=True) if slot.column])
    if not np.all(np.isfinite(theta)):
        return "failed", "the search left the range of floating-point numbers; no law of this form fits."
    # The order matters: a law that does not fall is reported as such, even where it is a fine minimum.
    if np.any(exponents <= 0.0):
        worst = float(exponents.min())
        return "at_bound", f"an exponent is {worst:.3g}: loss does not fall with it, so the law predicts nothing."
    # A floor is a term without columns; the search stops far below any loss if the data need none.
    floor = [j for j, slot in enumerate(layout.slots) if slot.column is None and not form.terms[slot.term]]
    if any(np.exp(theta[j]) < 1e-4 * problem.loss.min() for j in floor):
        return "at_bound", "the floor ends at 0: these runs need none. Use the law without a floor."
    if not fitted.certificate.gap <= 1e-6:  # NaN fails too
        return "failed", f"the search stopped {fitted.certificate.gap:.1g} of the objective above a minimum."
    if form.design == "grid" and _collinear(fitted):
        return "not_identified", (
            "parameters and tokens move together in these runs, which cannot separate their effects. Use a law of "
            "compute, or add runs that split the same compute otherwise."
        )
    if floor:
        # On a ladder floor and exponent trade against each other; on a grid two terms fall at different rates.
        low, high = profile_floor(fitted, floor[0])
        if low <= 0.0 and form.design == "ladder":
            return "not_identified", (
                f"floors from 0 to {high:.2f} nats fit these {len(problem.loss)} runs equally well "
                "(95 %); neither floor nor exponent is identified."
            )
    return "converged", ""


def _collinear(fitted: Minimum) -> bool:
    """True if two columns of the form rise together over the rows, so that their exponents cannot be separated."""
    columns: dict[str, Array] = {}  # minus the centred log of each column, shape (rows,)
    for j, slot in enumerate(fitted.layout.slots):
        if slot.column:
            # Slots of single arms are zero on the rows of the others, so they add up to the column.
            columns[slot.column] = columns.get(slot.column, 0.0) + np.asarray(fitted.problem.z[:, j])
    for one, other in itertools.combinations([column - column.mean() for column in columns.values()], 2):
        # Products and no quotient: sizes that are all equal have no spread, and leave nothing unexplained either.
        spread = float(one @ one) * float(other @ other)
        if spread - float(one @ other) ** 2 <= max(MAX_COLLINEAR_SHARE * spread, 1e-20):
            return True
    return False


def profile_floor(fitted: Minimum, position: int) -> tuple[float, float]:
    """The 95 % interval of the floor by profile likelihood, in nats.

    With ``S(E)`` the objective minimised over all other parameters at a fixed floor E, and S its minimum, E is kept if
    ``S(E) <= S * (1 + F(1, n - p; 0.95) / (n - p))`` for n rows and p parameters. The floor's logarithm is the parameter
    at `position`.

    Returns:
        Lowest and highest floor; the lowest is 0 where a law without floor fits about as well.
    """
    from scipy.special import fdtri

    problem, theta = fitted.problem, fitted.theta
    freedom = len(problem.loss) - len(theta)
    top = float(problem.loss.min())
    if freedom < 1:
        return 0.0, top
    # F test of one more parameter: the increase of the objective over its value per degree of freedom.
    allowed = fitted.certificate.objective * (1.0 + float(fdtri(1, freedom, 0.95)) / freedom)
    # From hardly any floor to nearly the smallest loss; all floors are minimised side by side.
    shares = np.concatenate([[1e-9], np.linspace(0.0, 1.0, PROFILE_STEPS + 1)[1:-1], [0.999]])
    start = np.repeat(theta[None], len(shares), axis=0)
    start[:, position] = np.log(shares * top)
    free = np.arange(len(theta)) != position
    within = shares[minimise(problem, start, free=free).objective <= allowed] * top
    # The fitted floor is inside by definition, even where it lies between two steps of the grid.
    best = float(np.exp(theta[position]))
    low, high = min([best, *within]), max([best, *within])
    return (0.0 if low <= 1e-6 * top else float(low)), float(high)
