"""Fit a table of runs that another tool exported: name one column, read, fit, print.

Usage: python fit.py EXPORT.csv

The rows of export.csv are synthetic: one law with noise, in which the arm "other" needs 1 / 1.4 = 0.714 of AdamW's FLOPs.
The same from the command line: scaling fit export.csv --map params=model/params_non_embedding
"""

from __future__ import annotations

import sys
from pathlib import Path

from analysis import Study, fit_table, read_table
from analysis.reporting.terminal import show

COLUMNS = {"params": "model/params_non_embedding"}
"""The export's column for a column of the harness, where the name is not a usual one."""


def fit(export: Path) -> Study:
    """Laws of all arms and the match ratio.

    Args:
        export: A CSV file with one row for each run.
    """
    table = read_table(export, names=COLUMNS)
    print(table.assumed)
    return fit_table(table, baseline="adamw")


if __name__ == "__main__":
    show(fit(Path(sys.argv[1])))
