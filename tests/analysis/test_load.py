"""Tables that cannot be fitted: errors in one sentence that names table, column, row and remedy."""

from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.data.cells import LeftOut
from analysis.data.table import TableError, check_table, read_table
from analysis.ratio.study import fit_table, load_or_fit, write_study
from scaling.errors import UserError


@pytest.fixture
def table() -> pd.DataFrame:
    return ladder({"adamw": ADAMW, "muon": MUON})


def error(frame: pd.DataFrame, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        fit_table(check_table(frame, "runs.csv", **options))  # type: ignore[arg-type]
    return str(caught.value)


def test_a_missing_column_names_it_and_what_looks_like_it(table: pd.DataFrame) -> None:
    text = error(table.rename(columns={"arm": "optimizer"}))
    assert "column arm is missing" in text
    assert '"optimizer" looks like arm' in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite(table: pd.DataFrame, value: float) -> None:
    table.loc[3, "loss"] = value
    assert "runs.csv, column loss, row 4" in error(table)


def test_ten_thousand_nan() -> None:
    many = ladder({"adamw": ADAMW, "muon": MUON}, rungs=5000).assign(loss=np.nan)
    assert "9,999 more rows" in error(many)


@pytest.mark.parametrize("value", [0.0, -1e18])
def test_compute_that_is_not_positive(table: pd.DataFrame, value: float) -> None:
    table.loc[2, "flops"] = value
    assert "column flops, row 3: found" in error(table)


def test_text_in_place_of_a_number(table: pd.DataFrame) -> None:
    frame = table.astype({"params": object})
    frame.loc[0, "params"] = "125M"
    assert "column params, row 1: found '125M'" in error(frame)


def test_flops_that_contradict_a_label(table: pd.DataFrame) -> None:
    table.loc[0, "params"] *= 399 / 339
    text = error(table)
    assert "column flops, row 1 of arm adamw" in text
    assert "label" in text


def test_a_strict_convention_refuses_another_count(table: pd.DataFrame) -> None:
    assert "6 * params * tokens" in error(table.assign(flops=table["flops"] * 1.3), convention="6nd")


def test_a_consistent_other_count_is_accepted(table: pd.DataFrame) -> None:
    counted = table.assign(flops=table["flops"] * (1.0 + 0.5 * (table["params"] / 1e7) ** -0.2))
    assert fit_table(check_table(counted)).comparisons[0].headline.ratio < 1.0


def test_two_rungs(table: pd.DataFrame) -> None:
    assert "2 distinct computes" in error(table.iloc[:4])


def test_one_arm(table: pd.DataFrame) -> None:
    assert "one arm alone" in error(table[table["arm"] == "muon"])


def test_equal_losses(table: pd.DataFrame) -> None:
    assert "a loss that falls with compute" in error(table.assign(loss=2.5))


def test_rising_loss(table: pd.DataFrame) -> None:
    assert "does not fall with compute" in error(table.assign(loss=table["loss"].to_numpy()[::-1]))


def test_arms_without_a_common_loss(table: pd.DataFrame) -> None:
    table.loc[table["arm"] == "muon", "loss"] *= 0.3
    assert "no loss in common" in error(table)
    assert fit_table(check_table(table), extrapolate=True).comparisons[0].headline.support != "interpolated"


def test_an_unnamed_baseline(table: pd.DataFrame) -> None:
    assert "--baseline sgd" in error(table.replace({"arm": {"adamw": "sgd"}}))


def test_a_misspelt_baseline(table: pd.DataFrame) -> None:
    with pytest.raises(UserError, match='did you mean "adamw"'):
        fit_table(table, baseline="adam")


def test_flops_in_another_unit(table: pd.DataFrame) -> None:
    text = error(table.assign(flops=table["flops"] / 8.64e19))
    assert "so it is in PFLOP/s-days" in text
    assert "8.64e+19" in text


def test_two_conventions_in_one_ratio(table: pd.DataFrame) -> None:
    named = table.assign(convention=table["arm"].map({"adamw": "6nd", "muon": "attention"}))
    assert "found 6nd in rows of adamw; attention in rows of muon" in error(named)
    assert fit_table(check_table(table.assign(convention="6nd"))).comparisons


def test_a_remark_on_losses_in_bits(table: pd.DataFrame) -> None:
    bits = table["loss"].where(table["arm"] == "adamw", table["loss"] / np.log(2))
    (remark,) = fit_table(check_table(table.assign(loss=bits))).comparisons[0].remarks
    assert "muon may be in bits and adamw in nats" in remark


@pytest.mark.parametrize("value", [1e280, 1e-290])
def test_losses_in_no_unit(table: pd.DataFrame, value: float) -> None:
    table.loc[3, "loss"] = value
    assert "column loss, row 4: found 1e" in error(table)


def test_text_in_a_setting_and_an_empty_step(table: pd.DataFrame) -> None:
    assert "column peak_lr, row 1 (and 9 more rows): found '12%'" in error(table.assign(peak_lr="12%"))
    steps = table.assign(step=[1.0, np.nan] * 5)
    assert fit_table(check_table(steps)).fits["adamw"].points == 5


def test_too_many_rows_and_arms(table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.data.table.MAX_ROWS", 9)
    assert "found 10 rows; at most 9 are fitted" in error(table)
    monkeypatch.setattr("analysis.data.table.MAX_ROWS", 10)
    monkeypatch.setattr("analysis.ratio.study.MAX_ARMS", 1)
    assert "found 2 arms; at most 1 are compared at once" in error(table)


def test_diverged_runs_are_counted_where_too_few_remain(table: pd.DataFrame) -> None:
    status = ["diverged" if arm == "muon" and row < 6 else "finished" for row, arm in enumerate(table["arm"])]
    assert "2 usable runs (3 diverged)" in error(table.assign(status=status))


def test_a_repeated_column_in_a_file(table: pd.DataFrame, tmp_path: Path) -> None:
    pd.concat([table, table[["loss"]] * 2], axis=1).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(TableError, match="found column loss twice"):
        read_table(tmp_path / "runs.csv")


def test_a_diverged_run_is_left_out_by_name(table: pd.DataFrame) -> None:
    table["status"] = "finished"
    table["reason"] = ""
    table.loc[0, ["status", "reason"]] = ["diverged", "loss not finite at step 40"]
    table.loc[0, "loss"] = np.nan
    study = fit_table(check_table(table))
    assert [(out.row, out.reason) for out in study.left_out] == [(1, "diverged: loss not finite at step 40")]
    assert study.fits["adamw"].points == 4


def test_a_repeated_row_counts_once(table: pd.DataFrame) -> None:
    twice = pd.concat([table, table], ignore_index=True)
    assert fit_table(check_table(twice)).comparisons == fit_table(check_table(table)).comparisons


@pytest.mark.parametrize("suffix", ["csv", "parquet", "tsv"])
def test_what_is_written_is_read(table: pd.DataFrame, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"runs.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert fit_table(read_table(path)).comparisons == fit_table(check_table(table)).comparisons


@pytest.mark.parametrize("content", ["", "arm;params\n", "\x00\x01binary"])
def test_a_file_that_is_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(content)
    with pytest.raises(TableError, match=r"runs\.csv"):
        read_table(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file"):
        read_table(tmp_path / "nowhere.csv")


def test_a_written_study_is_reused_for_the_same_table_and_options(table: pd.DataFrame, tmp_path: Path) -> None:
    runs = check_table(table)
    study = load_or_fit(runs, tmp_path)
    assert not list(tmp_path.iterdir())
    marked = msgspec.structs.replace(study, left_out=[LeftOut(row=1, arm="adamw", reason="from the file")])
    write_study(marked, tmp_path / "fits.json")
    assert load_or_fit(runs, tmp_path) == marked
    assert load_or_fit(runs, tmp_path, family="lines").options.family == "lines"
    assert load_or_fit(check_table(table.assign(loss=1.01 * table["loss"])), tmp_path).left_out == []
    (tmp_path / "fits.json").write_text('{"table": "tab')
    assert load_or_fit(runs, tmp_path) == study


def test_a_table_has_one_hash_in_every_file_format(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "runs.csv", index=False)
    table.to_parquet(tmp_path / "runs.parquet")
    assert read_table(tmp_path / "runs.csv").sha256 == read_table(tmp_path / "runs.parquet").sha256
    assert len(repr(fit_table(read_table(tmp_path / "runs.csv")))) < 200
