"""Fit a table of runs that another tool exported: rename its columns, count FLOPs, fit, print.

Usage: python fit.py EXPORT.csv

The rows of export.csv are synthetic: one law with noise, in which the arm "other" needs 1 / 1.4 = 0.714 of AdamW's FLOPs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from analysis.data.table import check_table
from analysis.ratio.study import Study, fit_table
from analysis.reporting.terminal import show

COLUMNS = {
    "optimizer": "arm",
    "model/params_non_embedding": "params",
    "data/tokens": "tokens",
    "eval/loss": "loss",
    "state": "status",
}
"""The export's column for each column of the harness; `run` and `seed` have the same name in both."""


def fit(export: Path) -> Study:
    """Laws of all arms and the match ratio.

    Args:
        export: A CSV file with the columns of `COLUMNS`, one row for each run.
    """
    frame = pd.read_csv(export).rename(columns=COLUMNS)
    # The export has no FLOPs. 6ND counts neither attention nor head, so the column names its convention.
    frame["flops"] = 6.0 * frame["params"] * frame["tokens"]
    frame["convention"] = "6nd"
    return fit_table(check_table(frame, export.name), baseline="adamw")


if __name__ == "__main__":
    show(fit(Path(sys.argv[1])))
