"""Power analysis of a planned comparison: synthetic studies from assumed laws, analysed like real ones.

`simulate` draws the losses of both arms at each planned cell, drops some runs, and fits them
(`analysis.power.batched_fit`). `forecasts` sums up widths, exclusion rates and biases of the match ratio at fixed losses, so
that plans can be compared.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, Rows
from analysis.fitting.families import LAW_FAMILIES, fit_family
from analysis.fitting.fit import Minimum
from analysis.fitting.laws import Law, LossSurface, PowerLaw
from analysis.power.batched_fit import Flags, Intervals, difference_intervals, fit_studies, law_intervals
from analysis.uncertainty.intervals import MAX_CELLS_FOR_T_INTERVAL
from scaling.errors import UserError
from scaling.io import Strict


class Laws(Strict, frozen=True):
    """Assumed laws of both arms. A row of `LAWS_ASSUMED`, or the user's own fit."""

    baseline: Law
    challenger: Law
    source: str
    around: float
    """Training FLOPs at the middle of the fitted range."""
    family: str | None = None
    """Row of ``analysis.fitting.families.LAW_FAMILIES`` of the fit, if it is one for ladders."""

    @property
    def has_floor(self) -> bool:
        """True if the loss of an arm has a limit above zero."""
        return any(law.floor > 0.0 for law in (self.baseline, self.challenger))


class Noise(Strict, frozen=True):
    """Standard deviations of ln loss. A row of `NOISES`, or two numbers."""

    cell: float
    """The part that both arms of a cell share: size, schedule, data order, seed."""
    difference: float
    """ln loss of one arm minus that of the other within a cell, about the difference of the laws."""
    source: str
    around: float = 0.0
    """Training FLOPs at the middle of the runs it was measured on."""


LAWS_ASSUMED: dict[str, Laws] = {
    "moonlight": Laws(
        baseline=PowerLaw(scale=2.608424, exponent=0.0544148),
        challenger=PowerLaw(scale=2.506192, exponent=0.0515115),
        source="AdamW and Muon as drawn in Moonlight's Fig. 1a (arXiv:2502.16982; Table 3 prints 2.608 C^-0.054 and "
        "2.506 C^-0.052)",
        around=9e19,
    ),
    "chinchilla": Laws(
        baseline=LossSurface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        challenger=LossSurface(E=1.8172, A=482.01, B=2085.43 * 1.25**-0.3658, alpha=0.3478, beta=0.3658),
        source="Chinchilla's surface as refitted by Besiroglu et al. (arXiv:2404.10102); the challenger's tokens are "
        "assumed to be worth 1.25 of the baseline's, an example and no measurement",
        around=1e21,
    ),
    "quick": Laws(
        baseline=PowerLaw(scale=0.0039231, exponent=0.26769, floor=0.93063),
        challenger=PowerLaw(scale=0.0033508, exponent=0.26769, floor=0.93063),
        source="AdamW and Muon of this project's campaign quick (results/demo): bytes, 21k to 151k parameters",
        around=4e11,
        family="one-multiplier",
    ),
}
"""Laws to plan with, by name."""

NOISES: dict[str, Noise] = {
    "moonlight": Noise(
        cell=0.00445,
        difference=0.00080,
        source="residuals of Moonlight's ten runs about their two lines (arXiv:2502.16982, Fig. 1a): 0.41 % and 0.47 %, "
        "correlation 0.996, 0.08 % about the line of the differences; one seed, training loss",
        around=9e19,
    ),
    "quick": Noise(
        cell=0.0,
        difference=0.0167,
        source="two seeds at three rungs of this project's campaign quick (results/demo): sd 0.0115 of ln loss for one "
        "run, 0.0167 for the difference of the arms on one seed, 3 degrees of freedom; arms of a seed share nothing there",
        around=2e11,
    ),
    "seeds-124m": Noise(
        cell=0.0,
        difference=0.0005,
        source="seeds alone, arms unpaired: 0.0011 nats at 124M parameters over 26 groups of 8 to 30 runs, about "
        "0.033 % of a loss of 3.3 (runs collected by Choshen et al., arXiv:2410.11840); a law's misfit is not in it",
        around=2e18,
    ),
}
"""Measured noise, by name."""


def nearest(rows: dict[str, Laws] | dict[str, Noise], flops: float) -> str:
    """The row measured nearest to a compute, as a factor."""
    return min(rows, key=lambda name: abs(np.log(rows[name].around / flops)))


class PlannedCells(NamedTuple):
    """Planned cells, arrays of shape ``(cells,)``; both arms train once in each."""

    params: Array
    tokens: Array
    flops: Array

    def take(self, which: NDArray[np.intp]) -> PlannedCells:
        """Some of them, repeats included: another seed is another cell."""
        return PlannedCells(self.params[which], self.tokens[which], self.flops[which])


class Truth:
    """Loss under the assumed laws along one way of splitting compute, and its inverse.

    Laws of compute need no split. For a surface, ln N at a compute between two cells is interpolated linearly in ln C, and
    beyond them it continues with their overall slope.
    """

    def __init__(self, laws: Laws, cells: PlannedCells) -> None:
        self.has_floor = laws.has_floor
        order = np.argsort(cells.flops)
        x, n = np.log(cells.flops[order]), np.log(cells.params[order])
        x, first = np.unique(x, return_index=True)
        n = n[first]
        slope = (n[-1] - n[0]) / (x[-1] - x[0]) if len(x) > 1 else 0.5
        self.grid = np.linspace(x[0] - 6.0, x[-1] + 9.0, 6001)
        split = np.interp(self.grid, x, n)
        split += slope * (np.minimum(self.grid - x[0], 0.0) + np.maximum(self.grid - x[-1], 0.0))
        columns = {"params": np.exp(split), "tokens": np.exp(self.grid - split) / 6.0, "flops": np.exp(self.grid)}
        self.losses = [law.evaluate(columns) for law in (laws.baseline, laws.challenger)]

    def loss(self, flops: Array, arm: int) -> Array:
        """Loss of an arm at a compute."""
        return np.interp(np.log(flops), self.grid, self.losses[arm])

    def flops(self, loss: Array, arm: int) -> Array:
        """Compute at which an arm reaches a loss; NaN where it never does within three decades of the plan."""
        return np.exp(np.interp(-loss, -self.losses[arm], self.grid, left=np.nan, right=np.nan))


class Forecast(Strict, frozen=True):
    """The match ratio at one loss over synthetic studies; widths are of the 95 % interval of the ratio."""

    loss: float
    baseline_flops: float
    challenger_flops: float
    ratio: float
    """Under the assumed laws."""
    width: float | None
    """Median over studies; None where more than half of them have no interval."""
    width_low: float | None
    """Tenth percentile over studies."""
    width_high: float | None
    """Ninetieth."""
    paired_width: float | None
    """Median of the interval by the paired difference line, the baseline's exponent taken as fitted; None under laws with
    a floor, whose differences of log loss follow no line."""
    excludes: float
    """Share of studies whose interval excludes the margin."""
    bias: float | None
    """Median over studies of estimated over true ratio, minus one."""
    coverage: float | None
    """Share of the intervals that contain the true ratio."""
    unanswered: float
    """Share of studies without an interval at this loss."""


class SyntheticStudies(NamedTuple):
    """Synthetic studies and their intervals."""

    fitted: Minimum
    """The fit of the noise-free runs."""
    loss: Array
    """Shape ``(studies, 2 * cells)``."""
    kept: Flags
    """True for runs that were not lost, same shape."""
    laws: Intervals
    """From the two laws."""
    paired: Intervals
    """From the paired difference line."""


def draw(
    cells: PlannedCells, truth: Truth, noise: Noise, *, lost: float, studies: int, seed: int
) -> tuple[Array, Flags]:
    """Losses of synthetic studies, shape ``(studies, 2 * cells)``, and True for runs that were not lost.

    ``ln L = ln law + s_cell + e_run`` with independent normal s (`Noise.cell`) and e; the difference of two runs has
    the deviation `Noise.difference`, so each e has it over the root of two.
    """
    generator = np.random.default_rng(seed)
    count = len(cells.flops)
    shared = noise.cell * generator.standard_normal((studies, 1, count))
    own = noise.difference / 2**0.5 * generator.standard_normal((studies, 2, count))
    clean = np.log(np.stack([truth.loss(cells.flops, arm) for arm in (0, 1)]))
    kept = generator.random((studies, 2 * count)) >= lost
    return np.exp(clean + shared + own).reshape(studies, -1), kept


def rows_of(cells: PlannedCells, loss: Array) -> Rows:
    """Cells of two arms as rows, by arm and then by cell."""
    columns = {name: np.tile(values, 2) for name, values in cells._asdict().items()}
    return Rows(np.repeat(np.arange(2), len(cells.flops)).astype(np.intp), loss, columns)


def simulate(
    cells: PlannedCells,
    truth: Truth,
    noise: Noise,
    at: Array,
    *,
    family: str,
    lost: float = 0.0,
    studies: int = 1000,
    seed: int = 0,
) -> SyntheticStudies:
    """Synthetic studies of one plan through the analysis.

    Raises:
        UserError: The cells are too few for the family, or lie at fewer than three computes.
    """
    form = LAW_FAMILIES[family]
    distinct = len(np.unique(np.round(np.log(cells.flops), 2)))
    if distinct < 3 or 2 * len(cells.flops) < form.size(2) + 2:
        raise UserError(
            f"a plan of {len(cells.flops)} cells at {distinct} computes cannot carry {form.label}, which has "
            f"{form.size(2)} parameters over both arms and needs three computes at least. Plan more rungs."
        )
    clean = np.concatenate([truth.loss(cells.flops, arm) for arm in (0, 1)])
    fitted = fit_family(form, rows_of(cells, clean), 2, best_of=8)
    loss, kept = draw(cells, truth, noise, lost=lost, studies=studies, seed=seed)
    theta = fit_studies(fitted, loss, kept)
    return SyntheticStudies(
        fitted,
        loss,
        kept,
        law_intervals(fitted, theta, loss, kept, at),
        difference_intervals(fitted, theta, loss, kept, cells.flops, at),
    )


def forecasts(simulated: SyntheticStudies, truth: Truth, at: Array, *, margin: float = 1.0) -> list[Forecast]:
    """Widths, exclusion rates (of the ratio `margin`), bias and coverage over the studies at each loss of `simulate`."""
    found, other = simulated.laws, simulated.paired
    compute = [truth.flops(at, arm) for arm in (0, 1)]
    result = []
    for k, loss in enumerate(at):
        known = np.isfinite(found.low[:, k]) & np.isfinite(found.high[:, k])
        low, high, width = found.low[known, k], found.high[known, k], found.width[known, k]
        true = float(compute[1][k] / compute[0][k])
        enough = float(known.mean()) > 0.5
        paired = other.width[np.isfinite(other.width[:, k]), k]
        edge = np.log(margin)
        result.append(
            Forecast(
                loss=float(loss),
                baseline_flops=float(compute[0][k]),
                challenger_flops=float(compute[1][k]),
                ratio=true,
                width=float(np.median(width)) if enough else None,
                width_low=float(np.quantile(width, 0.1)) if enough else None,
                width_high=float(np.quantile(width, 0.9)) if enough else None,
                paired_width=float(np.median(paired)) if len(paired) > len(known) / 2 and not truth.has_floor else None,
                excludes=float(np.sum((low > edge) | (high < edge)) / len(known)),
                bias=float(np.expm1(np.median(found.ratio[known, k] - np.log(true)))) if enough else None,
                coverage=float(np.mean((low <= np.log(true)) & (np.log(true) <= high))) if enough else None,
                unanswered=1.0 - float(known.mean()),
            )
        )
    return result


BOOTSTRAP_REMARK = f"more than {MAX_CELLS_FOR_T_INTERVAL} cells: the fit itself would take a case bootstrap, which the t interval approximates here"
