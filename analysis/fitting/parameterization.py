"""Layout of a law's parameters over arms: which constants and exponents the arms share, and the `Problem` that results.

A law is ``L = sum_k exp(c_k - sum_j p_kj (ln x_j - m_j))`` with one log constant `c_k` a term and one exponent `p_kj` a
column of a term. The columns are centred at their mean logarithm `m_j`: constant and exponent would otherwise be almost
perfectly correlated, since ln x is far from 0 for counts like 1e20.

One arm is a family in which nothing is shared, so single laws and families have one code path.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from analysis.data.cells import Array, Rows
from analysis.fitting.laws import FLOPS_LEVEL, Ladder, Law, LawForm
from analysis.fitting.solver import Problem, Space
from scaling.errors import UserError
from scaling.units import pflops_days

START_EXPONENTS: dict[str, tuple[float, ...]] = {
    "flops": (0.03, 0.06, 0.12, 0.25, 0.5),
    "params": (0.15, 0.3, 0.5, 0.8),
    "tokens": (0.15, 0.3, 0.5, 0.8),
}
"""Exponents from which the search starts. Published ones lie between 0.03 and 0.7."""

MIN_START_CONSTANT, MAX_START_CONSTANT = 0.02, 10.0
"""Size of a term at the centre of the columns where the search starts, as shares of the smallest and largest loss."""


class Sharing(NamedTuple):
    """Parameters that all arms share: one flag for the constant of each term, one for each exponent."""

    constants: tuple[bool, ...]
    exponents: tuple[bool, ...]


class Slot(NamedTuple):
    """One parameter of a term: its arm (None: shared by all) and its column (None: the log constant of the term)."""

    term: int
    arm: int | None
    column: str | None


class Parameterization(NamedTuple):
    """A form over arms with the position of each parameter."""

    form: LawForm
    arms: int
    slots: tuple[Slot, ...]
    centres: Mapping[str, float]
    """Mean logarithm of each column."""
    ladders: tuple[Ladder, ...]
    """For each arm the columns as powers of compute along its runs; empty for forms that need a grid."""

    @property
    def size(self) -> int:
        """Number of free parameters over all arms."""
        return len(self.slots)

    def problem(self, rows: Rows, *, space: Space, delta: float | None) -> Problem:
        """The rows as affine coefficients of the parameters, so that ``term k = exp(sum_j z[:, j] * theta[j])``."""
        z = np.zeros((len(rows.loss), self.size))  # (rows, parameters)
        logs = {name: np.log(rows.columns[name]) - self.centres[name] for name in self.form.columns}
        for j, slot in enumerate(self.slots):
            value = np.ones(len(rows.loss)) if slot.column is None else -logs[slot.column]
            # A parameter of one arm has no effect on the rows of the others.
            z[:, j] = value if slot.arm is None else np.where(rows.arm == slot.arm, value, 0.0)
        term = np.array([slot.term for slot in self.slots], dtype=np.intp)
        return Problem(z=z, term=term, loss=rows.loss, space=space, delta=delta)

    def parameters(self, theta: Array, arm: int) -> tuple[Array, Array]:
        """Constants of one arm in units of the table, and its exponents; the last axes run over terms and over columns.

        A centred log constant c gives ``exp(c + sum_j p_j m_j)`` as factor of the raw columns.
        """
        exponents, constants = [], []
        for term, names in enumerate(self.form.terms):
            log = theta[..., self.position(term, arm, None)]
            for name in names:
                # c + sum_j p_j m_j: the centres move back into the constant.
                power = theta[..., self.position(term, arm, name)]
                exponents.append(power)
                log = log + power * self.centres[name]
            with np.errstate(over="ignore"):
                constants.append(np.exp(log))
        return np.stack(constants, axis=-1), np.stack(exponents, axis=-1)

    def law(self, theta: Array, arm: int = 0) -> Law:
        """The law of one arm at parameters of shape ``(parameters,)``."""
        return self.form.law(*self.parameters(theta, arm), self.ladders[arm])

    def draws(self, theta: Array, arm: int = 0) -> dict[str, Array]:
        """Parameters of one arm's resampled laws by name, from `theta` of shape ``(draws, parameters)``."""
        return self.form.draws(*self.parameters(theta, arm), self.ladders[arm])

    def position(self, term: int, arm: int, column: str | None) -> int:
        """Position of a parameter that an arm uses, its own or the shared one."""
        for j, slot in enumerate(self.slots):
            if slot.term == term and slot.column == column and slot.arm in (None, arm):
                return j
        raise KeyError((term, arm, column))

    def starts(self, rows: Rows) -> Array:
        """Starting points, shape ``(starts, parameters)``: a grid of exponents, each with the constants that fit best.

        Given the exponents, ``L = sum_k a_k f_k`` is linear in its constants ``a_k``. They minimise
        ``sum_i (sum_k a_k f_ik / L_i - 1)^2``, the relative errors, so with ``G = f / L`` they solve ``G'G a = G'1``.
        """
        columns = [slot.column for slot in self.slots]
        powers = [name for term in self.form.terms for name in term]
        unit = self.problem(rows, space="log", delta=None)
        constants = np.array([name is None for name in columns])
        grid = []
        for choice in itertools.product(*(START_EXPONENTS[name] for name in powers)):
            values = dict(zip(powers, choice, strict=True))
            grid.append([0.0 if name is None else values[name] for name in columns])
        theta = np.array(grid)
        # Each term without its constant, in units of the observed loss: (starts, rows, constants).
        basis = np.empty((len(theta), len(rows.loss), int(constants.sum())))
        for at, j in enumerate(np.flatnonzero(constants)):
            # exp of the exponents' part of term k, and zero on the rows of other arms.
            own = (unit.term == unit.term[j]) & ~constants
            basis[:, :, at] = np.exp(theta[:, own] @ unit.z[:, own].T) * (unit.z[:, j] != 0.0) / rows.loss
        normal = np.matmul(basis.transpose(0, 2, 1), basis)  # G'G, (starts, constants, constants)
        # Terms that hardly differ over the rows make G'G singular; the ridge keeps the start finite.
        ridge = 1e-9 * np.einsum("bii->bi", normal).mean(axis=1)
        normal[:, range(normal.shape[1]), range(normal.shape[1])] += ridge[:, None]
        heights = np.linalg.solve(normal, basis.sum(axis=1)[:, :, None])[:, :, 0]
        # The search moves log constants, so one that came out negative or tiny starts at a small positive value.
        least, most = MIN_START_CONSTANT * float(rows.loss.min()), MAX_START_CONSTANT * float(rows.loss.max())
        theta[:, constants] = np.log(np.clip(heights, least, most))
        return theta


def parameterize(form: LawForm, rows: Rows, *, arms: int = 1, sharing: Sharing | None = None) -> Parameterization:
    """The parameters of a form over `arms`, constants before exponents within each term."""
    missing = [name for name in form.columns if name not in rows.columns]
    if missing:
        raise UserError(
            f"the law {form.label} reads the column {missing[0]}, and these rows have {', '.join(rows.columns)}. Add the "
            "column to the table, or fit another law."
        )
    sharing = sharing or Sharing((False,) * len(form.terms), (False,) * sum(map(len, form.terms)))
    # The constant of a term first, then its exponents, in the order in which `Sharing` counts them.
    slots: list[Slot] = []
    power = 0
    for term, names in enumerate(form.terms):
        slots += _slots(term, None, arms, sharing.constants[term])
        for name in names:
            slots += _slots(term, name, arms, sharing.exponents[power])
            power += 1
    centres = {name: float(np.log(rows.columns[name]).mean()) for name in form.columns}
    ladders = tuple(ladder_of(form, rows, arm) for arm in range(arms))
    return Parameterization(form, arms, tuple(slots), centres, ladders)


def ladder_of(form: LawForm, rows: Rows, arm: int) -> Ladder:
    """The columns of a form as powers of compute along the runs of an arm, by least squares in logarithms."""
    if form.design == "grid" or "flops" not in rows.columns:
        return {}
    own = rows.arm == arm
    x = np.log(pflops_days(1.0) * rows.columns["flops"][own])
    found = {}
    for name in form.columns:
        if name == "flops":
            found[name] = (FLOPS_LEVEL, 1.0)
        elif len(x) and np.ptp(x) > 0.0:
            # Runs on a ladder lie close to such a line; `analysis.ratio.study.is_ladder` bounds the scatter.
            slope, level = np.polyfit(x, np.log(rows.columns[name][own]), 1)
            found[name] = (float(level), float(slope))
    return found


def _slots(term: int, column: str | None, arms: int, shared: bool) -> Sequence[Slot]:
    return [Slot(term, None, column)] if shared or arms == 1 else [Slot(term, arm, column) for arm in range(arms)]
