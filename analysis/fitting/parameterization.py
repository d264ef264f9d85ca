"""From rows of a table to a `Problem`: which constant and which exponent each arm has for itself, and which it shares.

One arm alone is the family in which nothing needs sharing, so a single law and a family over arms are one code path.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from analysis.data.cells import Array, Rows
from analysis.fitting.laws import Law, LawForm
from analysis.fitting.solver import Problem, Space

EXPONENTS: dict[str, tuple[float, ...]] = {
    "flops": (0.03, 0.06, 0.12, 0.25, 0.5),
    "params": (0.15, 0.3, 0.5, 0.8),
    "tokens": (0.15, 0.3, 0.5, 0.8),
}
"""Where the search for exponents starts. Published ones lie between 0.03 and 0.7."""


class Sharing(NamedTuple):
    """Which parameters all arms have in common: for each term its constant, then its exponents."""

    constants: tuple[bool, ...]
    exponents: tuple[bool, ...]


def separate(form: LawForm) -> Sharing:
    """Nothing shared: each arm has its own law."""
    return Sharing((False,) * len(form.terms), (False,) * sum(len(term) for term in form.terms))


class Slot(NamedTuple):
    """One parameter: of which term, for which arm (None: all), of which column (None: the term's constant)."""

    term: int
    arm: int | None
    column: str | None


class Parameterization(NamedTuple):
    """A form over arms with its parameters laid out."""

    form: LawForm
    arms: int
    slots: tuple[Slot, ...]
    centres: Mapping[str, float]
    """Mean log of each column: exponents turn around it, which is what keeps constant and exponent apart."""

    @property
    def size(self) -> int:
        """Number of free parameters over all arms."""
        return len(self.slots)

    def problem(self, rows: Rows, *, space: Space, delta: float | None) -> Problem:
        """The rows under this design."""
        z = np.zeros((len(rows.loss), self.size))
        logs = {name: np.log(rows.columns[name]) - self.centres[name] for name in self.form.columns}
        for j, slot in enumerate(self.slots):
            value = np.ones(len(rows.loss)) if slot.column is None else -logs[slot.column]
            z[:, j] = value if slot.arm is None else np.where(rows.arm == slot.arm, value, 0.0)
        term = np.array([slot.term for slot in self.slots], dtype=np.intp)
        return Problem(z=z, term=term, loss=rows.loss, space=space, delta=delta)

    def parameters(self, theta: Array, arm: int) -> tuple[Array, Array]:
        """Constants in the table's units and exponents of one arm, last axis over terms and over powers.

        Args:
            theta: Shape ``(parameters,)`` or ``(draws, parameters)``.
            arm: Number of the arm.
        """
        exponents, constants = [], []
        for term, names in enumerate(self.form.terms):
            log = theta[..., self.position(term, arm, None)]
            for name in names:
                power = theta[..., self.position(term, arm, name)]
                exponents.append(power)
                log = log + power * self.centres[name]
            with np.errstate(over="ignore"):
                constants.append(np.exp(log))
        return np.stack(constants, axis=-1), np.stack(exponents, axis=-1) if exponents else np.empty(
            (*theta.shape[:-1], 0)
        )

    def law(self, theta: Array, arm: int = 0) -> Law:
        """The value of one arm."""
        return self.form.build(*self.parameters(theta, arm))

    def position(self, term: int, arm: int, column: str | None) -> int:
        """Position of a parameter that an arm uses, its own or the shared one."""
        for j, slot in enumerate(self.slots):
            if slot.term == term and slot.column == column and slot.arm in (None, arm):
                return j
        raise KeyError((term, arm, column))

    def starts(self, rows: Rows) -> Array:
        """Starting points: exponents from a grid, and the constants that fit best with them.

        Given the exponents the law is linear in its constants, so a small least-squares problem for each point of the
        grid leaves only the exponents to be searched.
        """
        columns = [slot.column for slot in self.slots]
        powers = [name for term in self.form.terms for name in term]
        unit = self.problem(rows, space="log", delta=None)
        constants = np.array([name is None for name in columns])
        grid = []
        for choice in itertools.product(*(EXPONENTS[name] for name in powers)):
            values = dict(zip(powers, choice, strict=True))
            theta = np.array([0.0 if name is None else values[name] for name in columns])
            grid.append(theta)
        theta = np.array(grid)
        # Basis functions: each term without its constant, in units of the observed loss.
        basis = np.empty((len(theta), len(rows.loss), int(constants.sum())))
        for at, j in enumerate(np.flatnonzero(constants)):
            own = (unit.term == unit.term[j]) & ~constants
            basis[:, :, at] = np.exp(theta[:, own] @ unit.z[:, own].T) * (unit.z[:, j] != 0.0) / rows.loss
        normal = np.matmul(basis.transpose(0, 2, 1), basis)
        ridge = 1e-9 * np.einsum("bii->bi", normal).mean(axis=1)
        normal[:, range(normal.shape[1]), range(normal.shape[1])] += ridge[:, None]
        heights = np.linalg.solve(normal, basis.sum(axis=1)[:, :, None])[:, :, 0]
        least = 0.02 * float(rows.loss.min())
        theta[:, constants] = np.log(np.clip(heights, least, 10.0 * float(rows.loss.max())))
        return theta


def parameterize(form: LawForm, rows: Rows, *, arms: int = 1, sharing: Sharing | None = None) -> Parameterization:
    """The parameters of a form over `arms`, constants before exponents within each term."""
    sharing = sharing or separate(form)
    slots: list[Slot] = []
    power = 0
    for term, names in enumerate(form.terms):
        slots += _spread(term, None, arms, sharing.constants[term])
        for name in names:
            slots += _spread(term, name, arms, sharing.exponents[power])
            power += 1
    centres = {name: float(np.log(rows.columns[name]).mean()) for name in form.columns}
    return Parameterization(form, arms, tuple(slots), centres)


def _spread(term: int, column: str | None, arms: int, shared: bool) -> Sequence[Slot]:
    return [Slot(term, None, column)] if shared or arms == 1 else [Slot(term, arm, column) for arm in range(arms)]
