"""What the data can carry: the range of floors that fit about as well as the best one."""

from __future__ import annotations

import numpy as np

from analysis.fit import Fitted
from analysis.solve import minimise

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
