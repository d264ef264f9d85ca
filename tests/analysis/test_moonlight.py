"""The published study from its ten points, which every fit must reproduce."""

import numpy as np
import pytest

from analysis.ratio.definitions import ARROW
from analysis.ratio.match import at_loss
from analysis.ratio.moonlight import (
    MOONLIGHT_BATCH,
    MOONLIGHT_LINES,
    MOONLIGHT_LOSSES,
    MOONLIGHT_PARAMS,
    MOONLIGHT_READ,
    moonlight_table,
)
from analysis.ratio.study import Study, fit_table, read_study, write_study
from scaling.power_rule import fit_power_rule


@pytest.fixture(scope="module")
def study() -> Study:
    return fit_table(moonlight_table())


@pytest.mark.parametrize("arm", MOONLIGHT_LINES)
def test_lines_are_the_drawn_ones(study: Study, arm: str) -> None:
    assert study.fits[arm].law.scale == pytest.approx(MOONLIGHT_LINES[arm].scale, rel=1e-5)
    assert study.fits[arm].law.exponent == pytest.approx(MOONLIGHT_LINES[arm].exponent, rel=1e-5)


@pytest.mark.parametrize("arm", MOONLIGHT_READ)
def test_reconciled_losses_round_to_the_readings(arm: str) -> None:
    assert np.round(MOONLIGHT_LOSSES[arm], 5).tolist() == list(MOONLIGHT_READ[arm])


def test_readings_alone_give_the_lines_to_five_decimals() -> None:
    study = fit_table(moonlight_table(reconciled=False))
    for arm, line in MOONLIGHT_LINES.items():
        assert study.fits[arm].law.exponent == pytest.approx(line.exponent, rel=2.5e-5)


def test_the_arrow_has_its_own_name(study: Study) -> None:
    found = {definition.name: definition for definition in study.comparisons[0].definitions}
    assert found[ARROW].ratio == pytest.approx(0.51878, abs=1e-4)
    assert found[ARROW].support == "half-extrapolated"


def test_ratio_at_the_challengers_runs(study: Study) -> None:
    # Lines at C_muon = 0.21, 0.53, 1.18, 2.17, 4.04 PFLOP/s-days.
    ratios = [point.ratio for point in study.comparisons[0].rungs]
    assert ratios == pytest.approx([0.441, 0.464, 0.484, 0.500, 0.517], abs=1e-3)


def test_headline_is_the_last_interpolated_point(study: Study) -> None:
    headline = study.comparisons[0].headline
    assert headline.support == "interpolated"
    assert headline.baseline_compute == pytest.approx(4.0378, rel=1e-4)
    assert headline.ratio == pytest.approx(0.498, abs=1e-3)


def test_paired_interval_at_the_largest_muon_run(study: Study) -> None:
    found = {definition.name: definition for definition in study.comparisons[0].definitions}
    point = found["laws at the challenger's largest run"]
    assert (point.low, point.high) == pytest.approx((0.498, 0.533), abs=3e-3)


def test_one_shared_exponent(study: Study) -> None:
    ratios = {model.family: model.ratio for model in study.comparisons[0].models}
    assert ratios["parallel-lines"] == pytest.approx(0.468, abs=2e-3)
    assert ratios["one-multiplier"] == pytest.approx(0.467, abs=2e-3)


def test_advantage_shrinks_inside_the_data(study: Study) -> None:
    line = study.comparisons[0].difference
    assert line is not None
    assert line.slope == pytest.approx(-0.0029, abs=1e-4)
    assert (line.slope_high - line.slope_low) / 2 == pytest.approx(0.0011, abs=1e-4)
    assert line.p == pytest.approx(0.004, abs=1e-3)
    assert line.correlation == pytest.approx(0.996, abs=1e-3)


def test_five_points_cannot_choose_a_floor() -> None:
    from analysis.data.cells import select
    from analysis.fitting.fit import fit_law

    cells = select(moonlight_table(), ("muon",))
    assert fit_law("power-floor", cells.rows, arm="muon").status == "not_identified"


def test_tokens_end_in_the_middle_of_the_last_80_steps() -> None:
    table = moonlight_table().frame
    assert table["flops"].max() / 8.64e19 == pytest.approx(4.03777, rel=1e-5)
    assert sorted(set(table["params"])) == sorted(MOONLIGHT_PARAMS)
    assert len(MOONLIGHT_BATCH) == 5


def test_a_study_is_read_back_as_it_was_written(study: Study, tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_study(study, tmp_path / "fits.json")
    assert read_study(tmp_path / "fits.json") == study


def test_one_loss_gives_one_ratio(study: Study) -> None:
    comparison = study.comparisons[0]
    point = at_loss(comparison.fits["adamw"], comparison.fits["muon"], comparison.headline.loss)
    assert point.ratio == comparison.headline.ratio


def test_width_of_the_interval_depends_on_the_method(study: Study) -> None:
    widths = {item.method: item.high - item.low for item in study.comparisons[0].intervals}
    assert widths["t, arms independent"] > 2 * widths["t, paired"]
    assert widths["t of the paired differences"] < widths["wild bootstrap, paired"] < widths["t, paired"]


def test_ratio_without_each_size(study: Study) -> None:
    # At the largest Muon run the same exercise gives 0.487 to 0.522.
    ratios = [item.ratio for item in study.comparisons[0].jackknife]
    assert ratios == pytest.approx([0.471, 0.503, 0.499, 0.501, 0.500], abs=1e-3)


def test_learning_rates_of_table_2_follow_a_power_of_compute() -> None:
    rates = (9.503e-4, 9.143e-4, 8.825e-4, 8.561e-4, 8.305e-4)
    table = moonlight_table().frame
    rule = fit_power_rule(table.loc[table["arm"] == "adamw", "flops"].to_numpy(), rates)
    assert rule.exponent == pytest.approx(-0.0455, abs=2e-4)
    assert rule.error is not None
    assert rule.error < 0.002
    assert rule.value(compute=1e20) == pytest.approx(0.00717 * 1e20**-0.04554, rel=2e-3)
    assert rule.points == 5
