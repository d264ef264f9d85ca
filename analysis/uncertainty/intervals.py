"""Confidence intervals of derived quantities, paired where the arms share their cells.

Residuals of two arms on the same cells are nearly equal (Moonlight: correlation 0.99), so a ratio is known several times
better than either law. `Linear` propagates that through any pair of laws: the response of the parameters to each
observation, and the covariance of the arms' residuals within a cell. Few cells get a t interval from it; many get the
paired case bootstrap, with both laws refitted in every resample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, Cells
from analysis.fitting.fit import Minimum
from analysis.fitting.solver import group_slopes, group_steps, minimise, newton_steps, predict

MAX_CELLS_FOR_T_INTERVAL = 60
"""Cells up to which the t interval is used. In 1000 studies each of 18, 36 and 66 cells it covered 95.4, 95.5 and 95.8 %,
the percentile bootstrap 92.9, 93.1 and 94.7 % (tests/bench/bench_analysis.py --coverage)."""

MAX_REFIT_WORK = 4e6
"""Rows times resamples up to which every resample is refitted to its minimum; beyond, each gets one Newton step."""

MIN_FREEDOM = 0.999
"""Degrees of freedom below which there is no interval: 1, less the rounding of the leverages."""

MAX_RESAMPLED_GROUPS = 10_000
"""Groups up to which a resample is drawn group by group; beyond, its sum is drawn from a normal distribution."""

ROUNDING = 1e-12
"""Widths of intervals of a logarithm, and spreads of paired differences, up to which they are rounding errors."""

Flags = NDArray[np.bool_]
Numbers = NDArray[np.intp]
Quantity = Callable[[Array], Array]
"""Function from parameters, shape ``(parameters,)``, to derived values, shape ``(values,)``; NaN where undefined."""


def t_quantile(freedom: float | Array) -> Array:
    """The two-sided 95 % quantile of Student's t."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(freedom, 0.975), dtype=np.float64)


class Linear(NamedTuple):
    """First-order response of the parameters to the observations, and the noise of the observations."""

    response: Array
    """Change of each parameter per unit of log loss of each row, shape ``(parameters, rows)``."""
    arm: Numbers
    """Arm of each row, shape ``(rows,)``."""
    cell: Numbers
    """Cell of each row, shape ``(rows,)``."""
    freedom: float
    """Degrees of freedom of the noise estimate: rows of an arm less their leverages, for the arm with the fewest."""
    noise: Array
    """Covariance of the arms' residuals within a cell, on log loss, shape ``(arms, arms)``."""
    correlation: float | None
    """Correlation of the first two arms' residuals within a cell; None where fewer than three cells are shared."""

    def spread(self, slope: Array) -> tuple[Array, Array]:
        """Standard errors of derived values and the degrees of freedom of each.

        A value with derivatives g responds to the rows of arm i in cell c by ``g' R_ic``, so with the covariance S of the
        arms within a cell its variance is

            sum_ij A_ij S_ij = trace(A S),    A_ij = sum_c (g' R_ic) (g' R_jc).

        The degrees of freedom follow from `satterthwaite`. The derivatives `slope` have the shape ``(values, parameters)``.
        """
        arms = len(self.noise)
        own = [self.response * (self.arm == a) for a in range(arms)]  # R of each arm, (parameters, rows)
        sums = [_by_cell(part, self.cell) for part in own]  # (parameters, cells)
        A = np.empty((len(slope), arms, arms))
        for i in range(arms):
            for j in range(arms):
                # Several rows of one arm in a cell have independent noise; rows of two arms share the cell's.
                product = own[i] @ own[i].T if i == j else sums[i] @ sums[j].T
                A[:, i, j] = np.einsum("vp,pq,vq->v", slope, product, slope)
        product = A @ self.noise
        variance = np.trace(product, axis1=1, axis2=2).clip(0.0)
        # Where the arms' noise cancels, the remainder is rounding.
        variance[variance <= ROUNDING * np.einsum("vii,ii->v", A, self.noise)] = 0.0
        squares = np.trace(product @ product, axis1=1, axis2=2)
        gain = satterthwaite(variance, squares, np.asarray(self.freedom), arms)
        return np.sqrt(variance), self.freedom * gain


def satterthwaite(variance: Array, squares: Array, nu: Array, arms: int) -> Array:
    """Degrees of freedom of an estimated variance ``trace(A S)``, as a multiple of those of S.

    S is a Wishart estimate of Sigma with nu degrees of freedom. Matching the mean and variance of ``trace(A S)`` to a scaled
    chi-square gives ``nu * T / Q`` with ``T = trace(A Sigma)^2`` and ``Q = trace((A Sigma)^2)``: a value that depends on
    several arms in different ways averages several noise estimates. The plug-in quotient is biased towards 1 for small nu,
    since

        E trace(A S)^2 = T + 2 Q / nu,    E trace((A S)^2) = Q + (T + Q) / nu,

    and solving both for T and Q gives unbiased estimates. `variance` is ``trace(A S)``, `squares` is ``trace((A S)^2)``;
    S has `arms` rows, the largest possible multiple.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = (nu + 2.0) * (nu - 1.0)
        T = np.where(nu > 1.0, (variance**2 * (nu + 1.0) - 2.0 * squares) * nu / scale, variance**2)
        Q = np.where(nu > 1.0, (squares * nu - variance**2) * nu / scale, squares)
        # Q is not positive where the noise estimate is rounding alone.
        gain = np.where(Q > 0, T / Q, np.where(nu > 1.0, float(arms), 1.0))
    return np.clip(gain, 1.0, arms)


def linear(fitted: Minimum, cells: Cells) -> Linear:
    """First-order response of the parameters to the observations, and the noise, paired within cells.

    At a weighted least-squares minimum ``J' W r = 0``. A change dy of the observed log losses moves it by
    ``R dy`` with ``R = (J' W J)^-1 J' W``. Exact for linear least squares, first-order otherwise; under Huber a row beyond
    the threshold has the weight ``delta / |r|`` of iteratively reweighted least squares.
    """
    problem = fitted.problem
    log_prediction, shares = predict(problem, fitted.theta[None])
    jacobian = (shares[0][problem.term] * problem.z.T).T  # of ln P, (rows, parameters)
    r = fitted.log_residuals()
    # In loss space the residual is P times that of the logarithm, so its square has weight P^2.
    w = np.exp(2.0 * log_prediction[0]) if problem.space == "loss" else np.ones(len(r))
    if problem.delta is not None:
        size = np.abs(r) * (np.exp(log_prediction[0]) if problem.space == "loss" else 1.0)
        w = w * problem.delta / np.maximum(size, problem.delta)
    bread = np.linalg.pinv(jacobian.T @ (w[:, None] * jacobian), hermitian=True)  # (J' W J)^-1
    response = bread @ (jacobian * w[:, None]).T  # R, (parameters, rows)
    # The diagonal of J R: the share of a parameter that each row pays for. They sum to the number of parameters.
    leverage = np.einsum("ij,ji->i", jacobian, response)
    arm, cell = cells.rows.arm, cells.cell
    count = len(cells.arms)
    freedom = np.array([max(np.sum(arm == a) - leverage[arm == a].sum(), 0.0) for a in range(count)])
    sigma = np.array([np.sqrt(np.sum(r[arm == a] ** 2) / max(freedom[a], 1e-9)) for a in range(count)])
    noise = np.diag(sigma**2)
    correlation = None
    for i in range(count):
        for j in range(i + 1, count):
            found = _correlation(r, arm == i, arm == j, cell)
            correlation = found if correlation is None else correlation
            noise[i, j] = noise[j, i] = (found or 0.0) * sigma[i] * sigma[j]
    return Linear(response, arm, cell, float(freedom.min()), noise, correlation)


def _by_cell(values: Array, cell: Numbers) -> Array:
    """Sums over the rows of each cell, shape ``(..., cells)``."""
    return np.stack([np.bincount(cell, weights=row, minlength=int(cell.max()) + 1) for row in values])


def _correlation(r: Array, first: Flags, second: Flags, cell: Numbers) -> float | None:
    """Correlation about zero of two arms' mean residuals over the cells that both have; None with fewer than three."""
    counts = _by_cell(np.stack([first, second]).astype(np.float64), cell)
    shared = (counts > 0).all(axis=0)
    if shared.sum() < 3:
        return None
    # Means over the rows of a cell, so that a cell with several runs of an arm counts once.
    one, two = _by_cell(np.stack([r * first, r * second]), cell)[:, shared] / counts[:, shared]
    size = float(np.sqrt(np.sum(one**2) * np.sum(two**2)))
    return float(np.clip(np.sum(one * two) / size, -1.0, 1.0)) if size > 0 else None


def gradient(quantity: Quantity, theta: Array) -> Array:
    """Derivatives of the quantity by central differences, ``(q(theta + h) - q(theta - h)) / 2h``.

    Shape ``(values, parameters)``, or ``(studies, values, parameters)`` for `theta` of shape ``(studies, parameters)``.
    """
    columns = []
    for j in range(theta.shape[-1]):
        step = np.zeros_like(theta)
        step[..., j] = 1e-5 * np.maximum(1.0, np.abs(theta[..., j]))
        columns.append((quantity(theta + step) - quantity(theta - step)) / (2 * step[..., j, None]))
    return np.stack(columns, axis=-1)


def t_interval(fitted: Minimum, cells: Cells, quantity: Quantity) -> tuple[Array, Array]:
    """Low and high of each derived value, ``q +- t(nu) * standard error``; NaN without degrees of freedom."""
    found = linear(fitted, cells)
    centre = quantity(fitted.theta)
    if found.freedom < MIN_FREEDOM:
        return np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    error, freedom = found.spread(gradient(quantity, fitted.theta))
    half = t_quantile(freedom) * error
    return has_width(centre - half, centre + half)


def has_width(low: Array, high: Array) -> tuple[Array, Array]:
    """The ends of intervals of derived logarithms; NaN where they differ by rounding only, which is no interval."""
    bad = ~(high - low > ROUNDING)
    return np.where(bad, np.nan, low), np.where(bad, np.nan, high)


def bootstrap(fitted: Minimum, groups: Numbers, *, resamples: int, seed: int = 0) -> Array:
    """Parameters refitted to resamples of whole groups (cells, or runs with their checkpoints).

    Each refit starts from the minimum of all data; resamples with extreme results are kept. Where rows times resamples pass
    `MAX_REFIT_WORK`, a refit is one Newton step from the minimum, which needs only the sums over each group. The result
    has the shape ``(resamples, parameters)``.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(seed)
    if len(names) > MAX_RESAMPLED_GROUPS and len(groups) * resamples > MAX_REFIT_WORK:
        slopes, curvature = group_slopes(fitted.problem, fitted.theta, inverse)
        # Resampling groups with replacement adds to their sum a variable with the covariance of the centred slopes.
        sums = slopes.sum(axis=0) + random_sums(slopes - slopes.mean(axis=0), resamples, generator)
        return fitted.theta - newton_steps(curvature, sums)
    # Drawing n groups of n with replacement is a multinomial count of each; a refit weights its rows by the count.
    counts = generator.multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=resamples).astype(np.float64)
    return refit(fitted, inverse, counts)


def random_sums(parts: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Sums of many parts under independent random weights of mean 0 and variance 1, shape ``(resamples, columns)``.

    The sum over more than `MAX_RESAMPLED_GROUPS` parts is normal for any such weights (central limit theorem), so it is
    drawn from the normal distribution with its covariance ``parts.T @ parts`` instead of weight by weight.
    """
    # With parts' parts = V diag(v) V', normal z times sqrt(v) V' has that covariance; rounding may make v negative.
    values, vectors = np.linalg.eigh(parts.T @ parts)
    normal = generator.standard_normal((resamples, parts.shape[1]))
    return np.asarray((normal * np.sqrt(values.clip(0.0))) @ vectors.T)


def refit(fitted: Minimum, groups: Numbers, counts: Array) -> Array:
    """Parameters under each row of `counts`, the number of times that each group ``0 .. groups - 1`` is taken."""
    if len(groups) * len(counts) > MAX_REFIT_WORK:
        return group_steps(fitted.problem, fitted.theta, groups, counts)
    return minimise(fitted.problem, fitted.theta, counts[:, groups], tolerance=1e-7, limit=60).theta


def percentile(draws: Array, centre: Array) -> tuple[Array, Array]:
    """The 2.5 % and 97.5 % quantiles of each derived value over resamples, widened to contain the centre.

    A resample without a value (NaN: a law that never reaches the loss) counts as beyond both ends, so that it widens the
    interval. `draws` has the shape ``(resamples, values)``; the centre holds the values of the fit to all data.
    """
    # "nearest" keeps an infinite end infinite; interpolation would make NaN of it.
    tail = (1.0 - 0.95) / 2
    bad = np.isnan(draws)
    low = np.quantile(np.where(bad, -np.inf, draws), tail, axis=0, method="nearest")
    high = np.quantile(np.where(bad, np.inf, draws), 1.0 - tail, axis=0, method="nearest")
    return np.minimum(low, centre), np.maximum(high, centre)
