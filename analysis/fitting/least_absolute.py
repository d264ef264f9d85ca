"""Least absolute deviations, exactly: a sequence of linear programs that starts at the Huber minimum.

At the minimum as many residuals as parameters are zero, a corner that smooth solvers only approach. Each program is

    min over step, u of sum(u)    with    -u <= r + J step <= u,    |step| <= radius

for residuals r and Jacobian J at the current point. The radius grows when the program predicts the decrease well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.data.cells import Array
from analysis.fitting.solver import Problem, minimise, predict, residuals

if TYPE_CHECKING:
    from analysis.fitting.fit import Certificate


MAX_LINEAR_PROGRAMS = 60


def least_absolute(problem: Problem, theta: Array, certificate: Certificate) -> tuple[Array, Certificate]:
    """The parameters with the least sum of absolute residuals, near a Huber minimum.

    Returns:
        The parameters, and the certificate with the sum as objective and the decrease that the last program predicts as gap.
    """
    import msgspec
    from scipy.optimize import linprog

    # Huber with a small threshold is almost the sum of absolute values, and brings the start close to the corner.
    for delta in (1e-4, 1e-5):
        theta = minimise(problem._replace(delta=delta), theta).theta[0]
    value, radius, gap = _total(problem, theta), 0.1, np.inf
    rows = len(problem.loss)
    for _ in range(MAX_LINEAR_PROGRAMS):
        r, jacobian = _linear(problem, theta)
        # Unknowns are (step, u), shapes (parameters,) and (rows,).
        found = linprog(
            np.concatenate([np.zeros(len(theta)), np.ones(rows)]),
            A_ub=np.block([[jacobian, -np.eye(rows)], [-jacobian, -np.eye(rows)]]),
            b_ub=np.concatenate([-r, r]),
            bounds=[(-radius, radius)] * len(theta) + [(0, None)] * rows,
            method="highs",
        )
        # Without a solution the last point stays; its gap says how good it is.
        if found.x is None or found.fun is None:
            break
        step = found.x[: len(theta)]
        promised, new = value - float(found.fun), _total(problem, theta + step)
        gap = max(promised, 0.0) / value if value > 0 else 0.0
        # Accept any decrease. The trust radius doubles where more than half of the predicted decrease came true, and shrinks
        # to a quarter where the step raised the sum.
        if new < value:
            theta, value = theta + step, new
            radius = min(2.0 * radius, 1.0) if value - new > 0.5 * promised else radius
        else:
            radius *= 0.25
        if gap < 1e-12 or radius < 1e-12:
            break
    return theta, msgspec.structs.replace(certificate, objective=value, gap=min(gap, 1.0), gradient=0.0)


def _total(problem: Problem, theta: Array) -> float:
    return float(np.abs(residuals(problem, predict(problem, theta[None])[0])).sum())


def _linear(problem: Problem, theta: Array) -> tuple[Array, Array]:
    log_prediction, shares = predict(problem, theta[None])
    jacobian = (shares[0][problem.term] * problem.z.T).T
    if problem.space == "loss":
        jacobian = jacobian * np.exp(log_prediction[0])[:, None]
    return residuals(problem, log_prediction)[0], jacobian
