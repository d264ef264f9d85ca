"""Laws: every form is recovered from its own points, and a new row works everywhere."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import ladder

from analysis.data.cells import Rows
from analysis.fitting.families import LAW_FAMILIES, LawFamily
from analysis.fitting.fit import EFFICIENT_DELTA, solve, tied_to_scale
from analysis.fitting.laws import LAWS, LawForm, LossSurface, PowerLaw, TermSum, UnreachableLoss
from analysis.fitting.objective import Objective
from analysis.fitting.parameterization import Sharing
from analysis.fitting.solver import minimise
from analysis.ratio.study import fit_table, read_study, write_study
from analysis.single_arm.fit_arm import fit_arm
from analysis.single_arm.holdout import hold_out
from scaling.errors import UserError


def points(form: LawForm) -> Rows:
    generator = np.random.default_rng(1)
    params = np.exp(generator.uniform(np.log(1e7), np.log(1e10), 40))
    tokens = params * np.exp(generator.uniform(np.log(2), np.log(200), 40))
    columns = {"params": params, "tokens": tokens, "flops": 6 * params * tokens}
    return Rows(np.zeros(40, dtype=np.intp), form.example.evaluate(columns), columns)


@pytest.mark.parametrize("form", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("space", ["log", "loss"])
def test_a_law_comes_back_from_its_own_points(form: LawForm, space: str) -> None:
    fitted = solve(form, points(form), Objective(space=space))  # type: ignore[arg-type]
    assert fitted.law().parameters() == pytest.approx(form.example.parameters(), rel=1e-6)


@pytest.mark.parametrize("form", LAWS.values(), ids=LAWS.keys())
def test_a_law_comes_back_from_random_starts(form: LawForm) -> None:
    rows = points(form)
    rows = rows._replace(loss=rows.loss * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(rows.loss))))
    fitted = solve(form, rows, Objective())
    starts = fitted.theta + np.random.default_rng(2).uniform(-1.0, 1.0, (60, len(fitted.theta)))
    exponents = [j for j, slot in enumerate(fitted.layout.slots) if slot.column]
    starts[:, exponents] = np.random.default_rng(3).uniform(0.02, 0.9, (60, len(exponents)))
    found = minimise(fitted.problem, starts)
    assert np.mean(found.objective <= fitted.certificate.objective * (1 + 1e-6)) >= 0.9
    assert found.objective.min() >= fitted.certificate.objective * (1 - 1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_noise_free_points_give_a_converged_fit(name: str) -> None:
    rows = points(LAWS[name])
    frame = pd.DataFrame({"arm": "a", "loss": rows.loss, **rows.columns})
    assert fit_arm(frame, name, resamples=0).fit.status == "converged"


def test_derivatives_are_those_of_the_objective() -> None:
    from analysis.fitting.solver import _derivatives, objective, predict, residuals

    form = LAWS["surface"]
    rows = points(form)
    rows = rows._replace(loss=rows.loss * np.exp(0.01 * np.random.default_rng(0).standard_normal(len(rows.loss))))
    for space in ("log", "loss"):
        for delta in (None, 1e-2):
            fitted = solve(form, rows, Objective(space=space))  # type: ignore[arg-type]
            problem = fitted.problem._replace(delta=delta)
            theta = fitted.theta + 0.01
            log_prediction, shares = predict(problem, theta[None])
            ones = np.ones((1, len(rows.loss)))
            slope, curve, _ = _derivatives(problem, log_prediction, shares, residuals(problem, log_prediction), ones)
            steps = 1e-5 * np.eye(len(theta))
            up, down = objective(problem, theta + steps), objective(problem, theta - steps)
            np.testing.assert_allclose(slope[0], (up - down) / 2e-5, rtol=1e-5, atol=1e-8)
            assert np.allclose(curve[0], curve[0].T)


def test_inverse_of_a_power_law() -> None:
    law = PowerLaw(scale=0.9, exponent=0.15, floor=1.7)
    assert law.compute(law.loss(3.0)) == pytest.approx(3.0)
    with pytest.raises(UnreachableLoss, match=r"at or below this law's floor of 1\.7"):
        law.compute(1.7)


def test_the_best_split_is_best() -> None:
    surface = LossSurface(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
    best = surface.optimum(1e21)
    assert best.params * best.tokens * 6 == pytest.approx(1e21)
    for lean in (0.9, 1.1):
        assert surface.loss(best.params * lean, best.tokens / lean) > best.loss
    assert surface.frontier().loss(1e21 / 8.64e19) == pytest.approx(best.loss, rel=1e-12)


def test_too_few_runs_for_a_law() -> None:
    frame = pd.DataFrame({"arm": "a", "params": [1e7, 2e7, 3e7], "tokens": 1e9, "loss": [3.0, 2.9, 2.8]})
    frame["flops"] = 6 * frame["params"] * frame["tokens"]
    with pytest.raises(UserError, match="3 usable runs"):
        fit_arm(frame, "surface")
    with pytest.raises(UserError, match='did you mean "power-floor"'):
        fit_arm(frame, "powerfloor")


def test_a_floor_that_the_points_do_not_need() -> None:
    rows = points(LAWS["power"])
    frame = pd.DataFrame({"arm": "a", "loss": rows.loss, **rows.columns})
    assert fit_arm(frame, "power-floor", resamples=0).fit.status in ("at_bound", "not_identified")


TOKENS_FLOOR = LawForm(label="E + B D^-beta", terms=((), ("tokens",)))


@pytest.fixture
def tokens_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law and a family that the packages do not have, each added as one row."""
    monkeypatch.setitem(LAWS, "tokens-floor", TOKENS_FLOOR)
    family = LawFamily("E + B_arm D^-beta", "tokens-floor", Sharing((True, False), (True,)))
    monkeypatch.setitem(LAW_FAMILIES, "tokens-multiplier", family)


@pytest.mark.usefixtures("tokens_row")
def test_intervals_of_a_new_row_contain_its_estimate() -> None:
    truth = PowerLaw(scale=0.92, exponent=0.155, floor=1.69)
    frame = ladder({"adamw": truth}, rungs=8, own=0.001, seeds=2)
    found = fit_arm(frame, "tokens-floor")
    assert found.fit.status == "converged"
    for parameter in found.parameters:
        assert parameter.low < parameter.value < parameter.high, parameter.name
    values = {parameter.name: parameter.value for parameter in found.parameters}
    assert values["exponent of tokens"] == pytest.approx(2 * truth.exponent, rel=0.2)  # C = 0.3 D^2 on this ladder
    assert values["floor"] == pytest.approx(truth.floor, rel=0.1)
    assert " D^-0.3" in found.fit.law.text()
    assert found.fit.law.frontier().loss(1.0) == pytest.approx(truth.loss(1.0), rel=1e-3)


@pytest.mark.usefixtures("tokens_row")
def test_a_new_row_enters_a_ratio(tmp_path: Path) -> None:
    laws = {"adamw": PowerLaw(scale=0.92, exponent=0.155, floor=1.69)}
    laws["muon"] = PowerLaw(scale=0.92 * 0.5**0.155, exponent=0.155, floor=1.69)
    study = fit_table(ladder(laws, rungs=8, shared=0.002, own=0.0005), family="tokens-multiplier")
    head = study.comparisons[0].headline
    assert head.low is not None
    assert head.high is not None
    assert head.low < head.ratio < head.high
    assert head.low < 0.5 < head.high
    write_study(study, tmp_path / "fits.json")
    assert read_study(tmp_path / "fits.json") == study


@pytest.mark.usefixtures("tokens_row")
def test_a_new_row_is_held_out_with_the_others() -> None:
    truth = PowerLaw(scale=0.92, exponent=0.155, floor=1.69)
    found = hold_out(ladder({"adamw": truth}, rungs=8, own=1e-4))
    assert {p.form for p in found.predictions} == {"power", "power-floor", "tokens-floor"}


def test_a_sum_of_two_falling_terms_has_no_law_of_compute() -> None:
    law = TermSum(terms=[[], ["params"], ["tokens"]], constants=[1.7, 400.0, 2000.0], exponents=[0.3, 0.4], ladder={})
    surface = LossSurface(E=1.7, A=400.0, B=2000.0, alpha=0.3, beta=0.4)
    columns = {"params": np.array([1e8]), "tokens": np.array([2e9])}
    assert law.evaluate(columns) == pytest.approx(surface.evaluate(columns))
    with pytest.raises(UserError, match="no power law of compute"):
        law.frontier()


def test_a_law_of_compute_needs_no_params_and_tokens() -> None:
    frame = ladder({"adamw": PowerLaw(scale=2.6, exponent=0.054)}, own=0.001)
    bare = fit_arm(frame[["arm", "flops", "loss"]], "power").fit
    assert bare.law == fit_arm(frame, "power").fit.law
    with pytest.raises(UserError, match="column params and tokens is missing"):
        fit_arm(frame[["arm", "flops", "loss"]], "surface")


GRID = np.geomspace(1e7, 1e9, 8)


@pytest.mark.parametrize(
    ("params", "tokens", "status"),
    [
        (GRID, 20 * GRID, "not_identified"),
        (np.full(8, 1e8), 20 * GRID, "not_identified"),
        (GRID, np.full(8, 1e10), "not_identified"),
        (GRID, 20 * GRID[[1, 0, 3, 2, 5, 4, 7, 6]], "converged"),
        (np.repeat(GRID[::2], 2), np.tile([1e9, 1e10], 4), "converged"),
    ],
    ids=["a ladder", "one size", "one budget", "a scattered ladder", "a grid"],
)
def test_a_surface_needs_runs_that_split_compute_in_several_ways(
    params: np.ndarray, tokens: np.ndarray, status: str
) -> None:
    frame = pd.DataFrame({"arm": "a", "params": params, "tokens": tokens, "flops": 6 * params * tokens})
    frame["loss"] = LAWS["surface"].example.evaluate({"params": params, "tokens": tokens})
    assert fit_arm(frame, "surface", resamples=0).fit.status == status


def test_a_robust_threshold_finds_the_scale_in_spite_of_outliers() -> None:
    form = LAWS["power"]
    noise = np.random.default_rng(5)
    flops = np.geomspace(1e17, 1e21, 200)
    truth = 0.1 * np.log(flops / 1e19)
    wild = np.where(np.arange(200) % 10 == 0, 0.3, 0.0)
    loss = 3.0 * np.exp(-truth + noise.normal(0, 0.01, 200) + wild)
    rows = Rows(loss=loss, columns={"flops": flops}, arm=np.zeros(200, dtype=np.intp))
    tied = tied_to_scale(form, rows)
    assert tied.delta == pytest.approx(EFFICIENT_DELTA * 0.01, rel=0.25)
    law = solve(form, rows, tied).law()
    assert isinstance(law, PowerLaw)
    assert law.exponent == pytest.approx(0.1, abs=0.001)
