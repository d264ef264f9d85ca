"""Tables that vary parameters and tokens: surfaces, factors, valleys."""

import numpy as np
import pytest
from synthetic import grid

from analysis.data.table import check_table
from analysis.fitting.laws import LossSurface
from analysis.ratio.study import Study, fit_table
from analysis.single_arm.isoflop import Valley, allocations, valley_bias

BASE = LossSurface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
EFFICIENT = LossSurface(
    E=BASE.E, A=BASE.A * 1.2**-BASE.alpha, B=BASE.B * 1.5**-BASE.beta, alpha=BASE.alpha, beta=BASE.beta
)
HOFFMANN = LossSurface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


@pytest.fixture(scope="module")
def study() -> Study:
    return fit_table(grid({"adamw": BASE, "muon": EFFICIENT}, noise=0.002), resamples=200)


def test_isoflop_tables_are_fitted_by_surfaces(study: Study) -> None:
    assert study.design == "grid"
    assert study.comparisons[0].family == "factors"


def test_the_planted_factors_come_back(study: Study) -> None:
    worth = study.comparisons[0].factors[0]
    assert worth.tokens.low < 1.5 < worth.tokens.high
    assert worth.params.low < 1.2 < worth.params.high


@pytest.mark.parametrize("family", ["shared-floor-surfaces", "separate-surfaces"])
def test_a_family_with_exponents_for_each_arm(family: str) -> None:
    comparison = fit_table(grid({"adamw": BASE, "muon": EFFICIENT}, noise=0.002), family=family).comparisons[0]
    assert comparison.headline.ratio == pytest.approx(1 / 1.8, rel=0.1)
    assert comparison.factors == []


def test_the_planted_ratio_is_inside_the_interval(study: Study) -> None:
    head = study.comparisons[0].headline
    assert head.low is not None
    assert head.high is not None
    assert head.low < 1 / 1.8 < head.high
    assert head.high - head.low < 0.05


def test_valleys_and_surface_agree_on_the_exponent() -> None:
    found = allocations(check_table(grid({"a": HOFFMANN}, noise=0.001)))
    assert found.parabolas is not None
    assert found.surface_exponent == pytest.approx(0.28 / 0.62, abs=0.02)
    assert found.parabolas["params"].exponent == pytest.approx(found.surface_exponent, abs=0.02)
    assert all(valley.position == "interior" for valley in found.valleys)


def test_a_valley_whose_best_run_is_the_last_tried_stays_out() -> None:
    low = HOFFMANN.__class__(E=1.69, A=406.4 * 20**0.34, B=410.7, alpha=0.34, beta=0.28)  # optimum beyond the grid
    found = allocations(check_table(grid({"a": low})))
    assert found.parabolas is None
    assert found.left_out


@pytest.mark.parametrize(
    ("surface", "width", "bias"),
    [
        (HOFFMANN, 8, 0.032),
        (HOFFMANN, 16, 0.058),
        (LossSurface(E=1.7, A=1300.0, B=124.0, alpha=0.465, beta=0.155), 8, 0.18),
        (LossSurface(E=1.7, A=1300.0, B=124.0, alpha=0.465, beta=0.155), 16, 0.33),
    ],
)
def test_parabolas_are_biased_without_any_noise(surface: LossSurface, width: float, bias: float) -> None:
    # Czech et al. 2026, arXiv:2603.22339.
    params = surface.optimum(1e20).params * np.geomspace(1 / width, width, 9)
    valley = Valley(
        flops=1e20,
        params=params.tolist(),
        losses=[],
        params_optimal=None,
        tokens_optimal=None,
        loss_optimal=None,
        curvature=1.0,
        position="interior",
        off_centre=0.0,
    )
    assert np.expm1(valley_bias(surface, [valley])) == pytest.approx(bias, abs=0.01)


def test_envelope_of_long_curves() -> None:
    import pandas as pd

    rows = []
    for params in np.geomspace(1e7, 1e10, 13):
        for tokens in params * np.geomspace(0.5, 400, 30):
            rows.append(
                ("a", params, tokens, 6 * params * tokens, HOFFMANN.loss(float(params), float(tokens)), f"{params}")
            )
    frame = pd.DataFrame(rows, columns=["arm", "params", "tokens", "flops", "loss", "run"])
    found = allocations(check_table(frame))
    assert found.envelope is not None
    assert found.envelope["params"].exponent == pytest.approx(0.28 / 0.62, abs=0.03)
