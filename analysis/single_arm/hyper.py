"""Laws of hyper-parameters: learning rate, batch, tokens as powers of compute, parameters or tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.data.cells import select
from analysis.data.table import RunsTable, check_table
from analysis.uncertainty.intervals import t_quantile
from scaling.errors import UserError, unknown_name
from scaling.spec import Strict

if TYPE_CHECKING:
    import pandas as pd


class HyperLaw(Strict, frozen=True):
    """``coefficient * product of columns ** exponents``, fitted by least squares of logarithms."""

    arm: str
    target: str
    coefficient: float
    exponents: dict[str, float]
    low: dict[str, float] | None
    """95 % t interval of each exponent; None where no degrees of freedom are left."""
    high: dict[str, float] | None
    error: float
    """Root mean square of the log residuals."""
    points: int

    def value(self, **columns: float) -> float:
        """The hyper-parameter at ``flops=``, ``params=``, ``tokens=``, whichever the law was fitted on."""
        powers = (columns[name] ** power for name, power in self.exponents.items())
        return float(self.coefficient * np.prod(list(powers)))


def fit_hyper(
    table: RunsTable | pd.DataFrame, target: str, on: tuple[str, ...] = ("flops",), arm: str | None = None
) -> HyperLaw:
    """A law of one column (``peak_lr``, ``batch_tokens``, ``tokens``, ...) from the best run of each size.

    Args:
        table: A table of runs, checked or not. Where a size was tried with several learning rates, its best counts.
        target: The column that is to be predicted.
        on: Columns that it is a product of powers of.
        arm: Which arm; not needed where the table has one.

    Raises:
        UserError: A column is missing or not positive, or there are fewer distinct points than parameters.
    """
    table = check_table(table)
    name, frame, arm = table.name, table.frame, table.only_arm(arm)
    for column in (target, *on):
        if column not in frame:
            raise UserError(f"{name}: {unknown_name('column', column, map(str, frame.columns))}")
    used = frame.loc[select(table, (arm,)).numbers - 1].groupby("params", sort=True)[[target, *on]].mean()
    values = used[[target, *on]].to_numpy(dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError(
            f"{name}, column {target}: arm {arm} has values that are not positive numbers. Fill or drop them."
        )
    y, x = np.log(values[:, 0]), np.log(values[:, 1:])
    centre = x.mean(axis=0)
    basis = np.column_stack([np.ones(len(y)), x - centre])
    if len(y) < basis.shape[1] or np.linalg.matrix_rank(basis) < basis.shape[1]:
        raise UserError(
            f"{name}: arm {arm} has {len(y)} sizes, which do not tell the exponents of {', '.join(on)} apart. "
            "Fit on fewer columns, or add sizes."
        )
    found = np.linalg.lstsq(basis, y, rcond=None)[0]
    left = y - basis @ found
    freedom = len(y) - basis.shape[1]
    ends: list[dict[str, float] | None] = [None, None]
    if freedom > 0:
        error = np.sqrt(np.diag(np.linalg.inv(basis.T @ basis)) * np.sum(left**2) / freedom)[1:]
        half = t_quantile(float(freedom), 0.95) * error
        ends = [dict(zip(on, map(float, found[1:] + sign * half), strict=True)) for sign in (-1.0, 1.0)]
    return HyperLaw(
        arm=arm,
        target=target,
        coefficient=float(np.exp(found[0] - centre @ found[1:])),
        exponents=dict(zip(on, map(float, found[1:]), strict=True)),
        low=ends[0],
        high=ends[1],
        error=float(np.sqrt(np.mean(left**2))),
        points=len(y),
    )
