"""Power rules: known rules in, the same rules out, and errors against simulated fits."""

import numpy as np
import pytest

from scaling.power_rule import PowerRule, fit_power_rule

COMPUTES = np.geomspace(1e17, 1e20, 5)


@pytest.mark.parametrize("sd", [None, (0.1, 0.2, 0.1, 0.3, 0.2)])
def test_the_fit_returns_the_rule_that_made_the_points(sd: tuple[float, ...] | None) -> None:
    truth = PowerRule(coefficient=0.3, exponent=-0.125)
    found = fit_power_rule(COMPUTES, [truth.value(compute=float(c)) for c in COMPUTES], sd=sd)
    assert (found.coefficient, found.exponent) == pytest.approx((0.3, -0.125), rel=1e-9)
    assert found.points == 5


def test_the_error_is_the_spread_of_the_exponent_over_fits() -> None:
    rng, sd = np.random.default_rng(0), np.array([0.1, 0.2, 0.1, 0.3, 0.2])
    draws = [fit_power_rule(COMPUTES, np.exp(sd * rng.normal(size=5)), sd=sd).exponent for _ in range(2000)]
    exact = fit_power_rule(COMPUTES, np.ones(5), sd=sd).error  # the points have no scatter of their own
    assert exact == pytest.approx(np.std(draws), rel=0.05)  # three standard errors of a spread over 2000 draws


def test_two_points_without_deviations_leave_the_error_open() -> None:
    assert fit_power_rule([1e17, 1e18], [1.0, 2.0]).error is None
    assert fit_power_rule([1e17, 1e18], [1.0, 2.0], sd=[0.1, 0.1]).interval is not None


def test_a_rule_of_size_and_data_is_a_product_of_powers() -> None:
    rule = PowerRule(coefficient=2.0, parameters_exponent=-0.5, tokens_exponent=1.0)
    assert rule.value(compute=1e30, parameters=4.0, tokens=3.0) == pytest.approx(3.0)
    assert not rule.constant
