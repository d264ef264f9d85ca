"""Accuracy of a design's forecast: 1000 studies of Moonlight's design in batch against 1000 analysed one by one.

python tests/bench/bench_design.py            # each by the fit of the family that the forecast assumes
python tests/bench/bench_design.py --whole 100   # by `fit_table`, which chooses its own family
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

from analysis.data.cells import Array
from analysis.data.cells import Cells as Chosen
from analysis.fitting.families import LAW_FAMILIES, fit_family, ratio_of
from analysis.power.simulate import LAWS_ASSUMED, NOISES, PlannedCells, Truth, draw, forecasts, rows_of, simulate
from analysis.ratio.moonlight import moonlight_table
from analysis.ratio.study import fit_table
from analysis.uncertainty.intervals import t_interval


def one_by_one(loss: Array, cells: PlannedCells, at: Array) -> Array:
    """Widths of each study's interval at each loss, by the functions of `scaling fit`."""
    number = np.tile(np.arange(len(cells.flops)), 2)
    widths = []
    for study in loss:
        rows = rows_of(cells, study)
        fitted = fit_family(LAW_FAMILIES["lines"], rows, 2, best_of=8)
        chosen = Chosen(rows, number, number, number, ("adamw", "muon"), [])
        low, high = t_interval(fitted, chosen, lambda theta, fitted=fitted: ratio_of(fitted, theta, at))  # type: ignore[misc]
        widths.append(np.exp(high) - np.exp(low))
    return np.array(widths)


def whole(loss: Array, cells: PlannedCells) -> tuple[Array, dict[str, int]]:
    """Width at the challenger's largest run by `fit_table`, and which families it chose."""
    widths, chosen = [], dict[str, int]()
    for study in loss:
        rows = rows_of(cells, study)
        frame = pd.DataFrame({**rows.columns, "arm": np.where(rows.arm == 0, "adamw", "muon"), "loss": study})
        found = fit_table(frame, resamples=20).comparisons[0]
        chosen[found.family] = chosen.get(found.family, 0) + 1
        last = found.rungs[-1]
        widths.append(np.nan if last.low is None or last.high is None else last.high - last.low)
    return np.array(widths), chosen


def main() -> None:
    """Print both widths and their quotient."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--whole", type=int, default=0)
    options = parser.parse_args()
    own = moonlight_table().frame.query("arm == 'adamw'")
    cells = PlannedCells(*(own[name].to_numpy(dtype=np.float64) for name in ("params", "tokens", "flops")))
    truth = Truth(LAWS_ASSUMED["moonlight"], cells)
    at = truth.loss(cells.flops, 1)
    noise = NOISES["moonlight"]

    start = time.perf_counter()
    rows = forecasts(simulate(cells, truth, noise, at, family="lines", studies=options.studies), truth, at)
    print(f"in batch: {options.studies} studies in {time.perf_counter() - start:.2f} s")
    predicted = np.array([row.width or np.nan for row in rows])

    loss, _ = draw(cells, truth, noise, lost=0.0, studies=options.studies, seed=12345)
    start = time.perf_counter()
    direct = np.median(one_by_one(loss, cells, at), axis=0)
    print(f"one by one, other draws: {time.perf_counter() - start:.1f} s")
    for rung, one, two in zip(own["rung"], predicted, direct, strict=True):
        print(f"  {rung:>5}: predicted {one:.4f}, direct {two:.4f}, quotient {one / two:.3f}")
    if options.whole:
        widths, chosen = whole(loss[: options.whole], cells)
        counts = ", ".join(f"{name} {count}" for name, count in sorted(chosen.items()))
        print(f"whole fit_table, {options.whole} studies: median width {np.nanmedian(widths):.4f}; families: {counts}")


if __name__ == "__main__":
    main()
