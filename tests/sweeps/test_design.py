"""Designs: the batched analysis equals the single one, widths equal those of a direct simulation, budgets are kept."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from analysis.data.cells import Array, select
from analysis.data.cells import Cells as Chosen
from analysis.fitting.families import LAW_FAMILIES, fit_family, ratio_of
from analysis.power.batched_fit import fit_studies, law_intervals
from analysis.power.forecast import RungOption, forecast
from analysis.power.simulate import (
    LAWS_ASSUMED,
    NOISES,
    Laws,
    Noise,
    PlannedCells,
    SyntheticStudies,
    Truth,
    draw,
    forecasts,
    rows_of,
    simulate,
)
from analysis.ratio.moonlight import moonlight_table
from analysis.ratio.study import fit_table
from analysis.uncertainty.intervals import linear, t_interval
from analysis.uncertainty.paired import difference
from scaling.cli import main

MOONLIGHT = LAWS_ASSUMED["moonlight"]


def moonlight_cells() -> PlannedCells:
    """Cells of the paper's five sizes."""
    own = moonlight_table().frame.query("arm == 'adamw'")
    return PlannedCells(*(own[name].to_numpy(dtype=np.float64) for name in ("params", "tokens", "flops")))


def wide_cells() -> PlannedCells:
    """Nine sizes, compute growing 300-fold."""
    return PlannedCells(
        *(np.geomspace(low, factor * low, 9) for low, factor in ((1e7, 300**0.5), (2e8, 300**0.5), (1.2e16, 300.0)))
    )


def real(loss: Array, kept: np.ndarray, cells: PlannedCells, family: str, at: Array) -> tuple[Array, Array]:
    """The interval as `scaling fit` makes it, one study."""
    count = len(cells.flops)
    rows = rows_of(cells, loss).take(kept)
    number = np.tile(np.arange(count), 2)[kept]
    fitted = fit_family(LAW_FAMILIES[family], rows, 2, best_of=8)
    chosen = Chosen(rows, number, number, number, ("adamw", "muon"), [])
    return t_interval(fitted, chosen, lambda theta: ratio_of(fitted, theta, at))


@pytest.mark.parametrize("family", ["lines", "parallel-lines", "shared-floor"])
def test_batched_intervals_equal_single_ones(family: str) -> None:
    floor = family == "shared-floor"
    # Five sizes cannot place a floor, and then minima lie along a valley; nine over two and a half decades can.
    cells = wide_cells() if floor else moonlight_cells()
    noise = Noise(cell=0.001, difference=0.0005, source="test") if floor else NOISES["moonlight"]
    truth = Truth(LAWS_ASSUMED["chinchilla"] if floor else MOONLIGHT, cells)
    at = truth.loss(cells.flops[1:4], 1)
    found = simulate(cells, truth, noise, at, family=family, lost=0.05, studies=12, seed=1)
    for loss, kept, low, high in zip(found.loss, found.kept, found.laws.low, found.laws.high, strict=True):
        if not np.isfinite(low).all() or kept.sum() < 9:
            continue
        want = real(loss, kept, cells, family, at)
        assert np.allclose(low, want[0], rtol=0, atol=1e-5)
        assert np.allclose(high, want[1], rtol=0, atol=1e-5)


def test_predicted_widths_equal_a_direct_simulation() -> None:
    cells = moonlight_cells()
    truth = Truth(MOONLIGHT, cells)
    at = truth.loss(cells.flops, 1)
    predicted = [
        row.width
        for row in forecasts(simulate(cells, truth, NOISES["moonlight"], at, family="lines", studies=1000), truth, at)
    ]
    # Another seed, another solver, each study by itself.
    loss, kept = draw(cells, truth, NOISES["moonlight"], lost=0.0, studies=150, seed=99)
    direct = []
    for one, held in zip(loss, kept, strict=True):
        low, high = real(one, held, cells, "lines", at)
        direct.append(np.exp(high) - np.exp(low))
    assert predicted == pytest.approx(np.median(direct, axis=0), rel=0.15)


def test_moonlights_design_predicts_its_interval() -> None:
    table = moonlight_table()
    study = fit_table(table, family="lines", resamples=20).comparisons[0]
    cells = moonlight_cells()
    truth = Truth(MOONLIGHT, cells)
    at = truth.loss(cells.flops[-1:], 1)
    found = simulate(cells, truth, NOISES["moonlight"], at, family="lines", studies=1000)
    named = next(d for d in study.definitions if d.name == "laws at the challenger's largest run")
    assert named.low is not None
    assert named.high is not None
    widths = found.paired.width[:, 0]
    assert np.quantile(widths, 0.1) < named.high - named.low < np.quantile(widths, 0.9)
    assert np.median(widths) == pytest.approx(0.533 - 0.498, rel=0.15)
    largest = study.rungs[-1]
    assert largest.low is not None
    assert largest.high is not None
    laws = found.laws.width[:, 0]
    assert np.quantile(laws, 0.1) < largest.high - largest.low < np.quantile(laws, 0.9)


def test_noise_row_matches_moonlights_residuals() -> None:
    cells = select(moonlight_table(), ("adamw", "muon"))
    line = difference(cells)
    assert line is not None
    assert NOISES["moonlight"].difference == pytest.approx(line.residual, rel=0.02)
    own = linear(fit_family(LAW_FAMILIES["lines"], cells.rows, 2), cells).noise
    shared = float(np.sqrt(own[0, 1]))
    assert NOISES["moonlight"].cell == pytest.approx(shared, rel=0.15)


def test_intervals_cover_the_ratio_unless_the_law_has_another_form() -> None:
    cells = wide_cells()
    noise = Noise(cell=0.002, difference=0.0005, source="test")

    def at_the_end(laws: Laws) -> tuple[float, float]:
        truth = Truth(laws, cells)
        at = truth.loss(cells.flops[-1:], 1)
        row = forecasts(simulate(cells, truth, noise, at, family="lines", studies=600), truth, at)[0]
        assert row.coverage is not None
        assert row.bias is not None
        return row.coverage, abs(row.bias)

    right, unbiased = at_the_end(MOONLIGHT)
    assert 0.92 < right < 0.98
    assert unbiased < 0.003
    # Straight lines through a curve with a floor: the forecast must show this bias of the method.
    wrong, biased = at_the_end(LAWS_ASSUMED["chinchilla"])
    assert biased > 10 * unbiased
    assert wrong < 0.9


def test_a_lost_run_removes_its_cell_from_the_pairing() -> None:
    cells = moonlight_cells()
    truth = Truth(MOONLIGHT, cells)
    at = truth.loss(cells.flops[-1:], 1)
    found = [
        forecasts(simulate(cells, truth, NOISES["moonlight"], at, family="lines", lost=lost, studies=500), truth, at)[0]
        for lost in (0.0, 0.3)
    ]
    assert found[0].unanswered == 0.0 < 0.2 < found[1].unanswered
    assert found[1].width is None or found[1].width > found[0].width > 0.0  # type: ignore[operator]


def design(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["scaling", "design", *words])
    main()
    return capsys.readouterr().out


def test_command_names_the_cheapest_design(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["quick", "--root", str(tmp_path), "--studies", "60", "--noise", "0.004,0.001", "--json"]
    answer = json.loads(design(capsys, monkeypatch, *words, "--width", "0.05"))
    chosen = answer["cheapest"]
    assert chosen["width"] <= 0.05
    assert not [row for row in answer["frontier"] if row["hours"] < chosen["hours"] and row["width"] <= 0.05]
    assert all(b["width"] < a["width"] and b["hours"] >= a["hours"] for a, b in itertools.pairwise(answer["frontier"]))
    assert (tmp_path / "results" / "quick" / "figures" / "design.svg").exists()

    poor = json.loads(design(capsys, monkeypatch, *words, "--width", "0.05", "--budget-gpu-hours", "0.001"))
    assert poor["cheapest"] is None
    assert poor["verdict"][0].startswith("No plan of the search reaches a width of 0.05")
    assert any(line.startswith("Reached by") for line in poor["verdict"])


def test_a_dropped_rung_widens_and_a_seed_narrows() -> None:
    points = [
        RungOption(str(k), float(n), float(t), float(f), 1.0)
        for k, (n, t, f) in enumerate(zip(*moonlight_cells(), strict=True))
    ]
    answer = forecast(
        campaign="test",
        arms=("adamw", "muon"),
        points=points,
        plan=(1,) * 5,
        changed={"without": (1, 1, 1, 1, 0), "more": (2,) * 5},
        searched=[(1,) * 5, (2,) * 5],
        laws=MOONLIGHT,
        noise=NOISES["moonlight"],
        studies=300,
    )
    without, more = answer.changed
    assert more.width < answer.plan.width < without.width  # type: ignore[operator]
    assert (without.hours, answer.plan.hours, more.hours) == (4.0, 5.0, 10.0)


def test_fits_end_at_one_minimum() -> None:
    cells = moonlight_cells()
    truth = Truth(MOONLIGHT, cells)
    at = truth.loss(cells.flops, 1)
    found: SyntheticStudies = simulate(cells, truth, NOISES["moonlight"], at, family="lines", studies=30)
    moved = found.fitted._replace(theta=found.fitted.theta * 1.3)
    theta = fit_studies(moved, found.loss, found.kept)
    again = law_intervals(moved, theta, found.loss, found.kept, at)
    assert np.allclose(again.low, found.laws.low, rtol=0, atol=1e-6)
