"""Laws of the loss: the forms that can be fitted, by name (`LAWS`), and the values that a fit returns.

Every form is a sum of terms, each a constant times powers of columns of the table: ``E + A * N**-alpha + B * D**-beta``
has three. The solver (`analysis.fitting.solver`) needs nothing else, so a new law is one row, here or in the entry points
``scaling_harness.laws`` of an installed package::

    LawForm(label="E + B D^-beta", terms=((), ("tokens",)))

The row and its value own everything that fits, tables and ratios need: text, parameters on the scale of the table, default
objective, columns, and the law of compute at the best allocation. Compute inside a law is in PFLOP/s-days, parameters
and tokens are counts, loss is in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array
from analysis.fitting.objective import HUBER, LEAST_SQUARES, Objective
from scaling.errors import UserError
from scaling.io import Strict
from scaling.registry import Registry
from scaling.units import FLOPS_PER_PFLOPS_DAY, flops_from_pflops_days, pflops_days

Numbers = TypeVar("Numbers", float, NDArray[np.float64])

Ladder = Mapping[str, tuple[float, float]]
"""Columns along a ladder of runs: ``ln column = level + slope * ln C`` with the pair (level, slope), C in PFLOP/s-days."""

FLOPS_LEVEL = float(np.log(FLOPS_PER_PFLOPS_DAY))
"""The level of the column flops, whose slope is 1."""

SYMBOLS = {"params": "N", "tokens": "D", "flops": "FLOPs"}
"""Columns in the text of a `TermSum`, in units of the table."""


class UnreachableLoss(UserError):
    """A loss at or below a law's floor, which no amount of compute reaches."""


class PowerLaw(Strict, frozen=True, tag="power"):
    """Loss as a power of training compute: ``floor + scale * C**-exponent``, `C` in PFLOP/s-days.

    Source: Moonlight, arXiv:2502.16982, Table 3, where the floor is fixed at 0.
    """

    scale: float
    """Loss above the floor at one PFLOP/s-day, nats per token."""
    exponent: float
    floor: float = 0.0

    def loss(self, compute: Numbers) -> Numbers:
        """Loss at a compute in PFLOP/s-days."""
        loss: Numbers = self.floor + self.scale * compute**-self.exponent
        return loss

    def compute(self, loss: Numbers) -> Numbers:
        """The compute in PFLOP/s-days that reaches a loss; the inverse of `loss`.

        Raises:
            UnreachableLoss: A loss is at or below the floor.
        """
        lowest = float(np.min(loss))
        if not lowest > self.floor:
            raise UnreachableLoss(
                f"loss {lowest:g} is at or below this law's floor of {self.floor:g}; no amount of compute reaches it. "
                "Give a loss above the floor."
            )
        compute: Numbers = ((loss - self.floor) / self.scale) ** (-1.0 / self.exponent)
        return compute

    def evaluate(self, columns: Mapping[str, Array]) -> Array:
        """Loss at rows of a table."""
        return np.asarray(self.loss(np.asarray(pflops_days(1.0) * columns["flops"], dtype=np.float64)))

    def frontier(self) -> PowerLaw:
        """The law itself."""
        return self

    def parameters(self) -> dict[str, float]:
        """Parameters by name."""
        found = {"scale": self.scale, "exponent": self.exponent}
        return found | {"floor": self.floor} if self.floor else found

    def text(self) -> str:
        """Formula with four to five digits."""
        power = f"{self.scale:.4g} C^{-self.exponent:.5f}"
        return f"{self.floor:.4g} + {power}" if self.floor else power

    def math(self) -> str:
        """Formula as LaTeX, without dollars."""
        power = f"{self.scale:.5g}\\,C^{{-{self.exponent:.5f}}}"
        return f"{self.floor:.4g} + {power}" if self.floor else power


class Allocation(Strict, frozen=True):
    """The compute-optimal split of a compute under a surface."""

    flops: float
    params: float
    tokens: float
    loss: float


class LossSurface(Strict, frozen=True, tag="surface"):
    """Loss over parameters and tokens: ``E + A * N**-alpha + B * D**-beta``.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, approach 3.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def floor(self) -> float:
        """`E`."""
        return self.E

    def loss(self, params: Numbers, tokens: Numbers) -> Numbers:
        """Loss of a model with `params` parameters after `tokens` tokens."""
        loss: Numbers = self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta
        return loss

    def evaluate(self, columns: Mapping[str, Array]) -> Array:
        """Loss at rows of a table."""
        return np.asarray(self.loss(columns["params"], columns["tokens"]))

    def optimum(self, flops: float) -> Allocation:
        """The split of ``flops = 6 N D`` with the lowest loss.

        With ``D = flops / 6N``, the derivative in ln N is zero where ``alpha A N^-alpha = beta B D^-beta``, so
        ``N = (alpha A / beta B)^(1 / (alpha + beta)) * (flops / 6)^(beta / (alpha + beta))``.

        Raises:
            UserError: An exponent is not positive, so that no split is best.
        """
        if min(self.alpha, self.beta) <= 0.0 or min(self.A, self.B) <= 0.0:
            raise UserError(
                f"the surface has exponents {self.alpha:.3g} (parameters) and {self.beta:.3g} (tokens); a best split "
                "of compute needs both above zero. Fit runs that vary both parameters and tokens."
            )
        half = flops / 6.0  # N D
        lean = (self.alpha * self.A / (self.beta * self.B)) ** (1.0 / (self.alpha + self.beta))
        params = lean * half ** (self.beta / (self.alpha + self.beta))
        tokens = half / params
        return Allocation(flops=flops, params=params, tokens=tokens, loss=float(self.loss(params, tokens)))

    def frontier(self) -> PowerLaw:
        """Loss of the best split as a law of compute: exactly a power law with floor `E`."""
        exponent = self.alpha * self.beta / (self.alpha + self.beta)
        # The scale is the loss above E at the best split of one PFLOP/s-day.
        at_one = self.optimum(flops_from_pflops_days(1.0))
        return PowerLaw(scale=at_one.loss - self.E, exponent=exponent, floor=self.E)

    def parameters(self) -> dict[str, float]:
        """Parameters by name, and the exponent of the optimal N that papers quote."""
        return {
            "A": self.A,
            "B": self.B,
            "E": self.E,
            "alpha": self.alpha,
            "beta": self.beta,
            "a = beta/(alpha+beta)": float(np.divide(self.beta, self.alpha + self.beta)),
        }

    def text(self) -> str:
        """Formula with four to five digits."""
        return f"{self.E:.4g} + {self.A:.5g} N^{-self.alpha:.4f} + {self.B:.5g} D^{-self.beta:.4f}"

    def math(self) -> str:
        """Formula as LaTeX, without dollars."""
        return f"{self.E:.4g} + {self.A:.5g}\\,N^{{-{self.alpha:.4f}}} + {self.B:.5g}\\,D^{{-{self.beta:.4f}}}"


class TermSum(Strict, frozen=True, tag="sum"):
    """Loss as a sum of terms, each a constant times powers of columns: the value of a form without a class of its own."""

    terms: list[list[str]]
    """Columns of each term; an empty list is the floor."""
    constants: list[float]
    """One a term, in units of the table."""
    exponents: list[float]
    """One a column of a term, in the order of `terms`; positive where loss falls with the column."""
    ladder: dict[str, tuple[float, float]]
    """Columns as powers of compute along the runs (`Ladder`); empty where they are none."""

    @property
    def floor(self) -> float:
        """Sum of the constants of terms without columns."""
        return sum(constant for constant, names in zip(self.constants, self.terms, strict=True) if not names)

    def _powers(self) -> list[tuple[float, list[tuple[str, float]]]]:
        """Constant, columns and exponents of each term."""
        exponents = iter(self.exponents)
        return [
            (constant, [(name, next(exponents)) for name in names])
            for constant, names in zip(self.constants, self.terms, strict=True)
        ]

    def evaluate(self, columns: Mapping[str, Array]) -> Array:
        """Loss at rows of a table."""
        rows = next(iter(columns.values()))
        total = np.zeros(len(rows))
        for constant, powers in self._powers():
            term = np.full(len(rows), constant)
            for name, exponent in powers:
                term = term * columns[name] ** -exponent
            total = total + term
        return total

    def frontier(self) -> PowerLaw:
        """Loss along the ladder of the runs as a law of compute.

        Raises:
            UserError: The form has several terms that fall, or the runs are on no ladder.
        """
        terms = tuple(tuple(names) for names in self.terms)
        if sum(map(bool, terms)) != 1 or not all(name in self.ladder for names in terms for name in names):
            raise UserError(
                f"the law {self.text()} is no power law of compute along these runs, so it gives no compute for a loss. "
                "Use a law with one term that falls, or runs whose tokens and parameters are powers of compute."
            )
        log_scale, exponent, floor = along_ladder(
            terms, np.array([self.constants]), np.array([self.exponents]), self.ladder
        )
        return PowerLaw(scale=float(np.exp(log_scale[0])), exponent=float(exponent[0]), floor=float(floor[0]))

    def parameters(self) -> dict[str, float]:
        """Parameters by name."""
        found: dict[str, float] = {}
        for number, (constant, powers) in enumerate(self._powers()):
            names = " ".join(name for name, _ in powers)
            again = f" ({number + 1})" if self.terms.index(self.terms[number]) != number else ""
            found[f"scale of {names}{again}" if names else f"floor{again}"] = constant
            found |= {f"exponent of {name}{again}": exponent for name, exponent in powers}
        return found

    def text(self) -> str:
        """Formula with four to five digits; FLOPs are counts, not PFLOP/s-days."""
        return self._formula("{}^{:.4f}", " ")

    def math(self) -> str:
        """Formula as LaTeX, without dollars."""
        return self._formula(r"\mathrm{{{}}}^{{{:.4f}}}", r"\,")

    def _formula(self, factor: str, times: str) -> str:
        terms = []
        for constant, powers in self._powers():
            factors = [factor.format(SYMBOLS.get(name, name), -exponent) for name, exponent in powers]
            terms.append(times.join([f"{constant:.5g}", *factors]))
        return " + ".join(terms)


Law = PowerLaw | LossSurface | TermSum

Frontier = tuple[Array, Array, Array]
"""Log scale, exponent and floor of a law of compute for each draw, each of shape ``(draws,)``; C in PFLOP/s-days."""


def along_ladder(terms: tuple[tuple[str, ...], ...], constants: Array, exponents: Array, ladder: Ladder) -> Frontier:
    """The law of compute of a form with one term that falls, along a ladder of runs.

    With ``ln column_j = level_j + slope_j * ln C``, the term ``a * prod_j column_j^-p_j`` is
    ``exp(ln a - sum_j p_j level_j) * C^-(sum_j p_j slope_j)``. Constants have the shape ``(draws, terms)``, exponents
    ``(draws, columns)``.
    """
    (falling,) = (number for number, names in enumerate(terms) if names)
    floors = [number for number, names in enumerate(terms) if not names]
    # Constants and exponents are in units of the table; the ladder converts to PFLOP/s-days.
    log_scale, power = np.log(constants[:, falling]), np.zeros(len(constants))
    for j, name in enumerate(terms[falling]):
        level, slope = ladder[name]
        log_scale = log_scale - exponents[:, j] * level
        power = power + exponents[:, j] * slope
    return log_scale, power, constants[:, floors].sum(axis=1)


def surface_frontier(constants: Array, exponents: Array) -> Frontier:
    """The law of compute of ``E + A N^-alpha + B D^-beta`` at the best split of ``C = 6 N D``: a power law with floor E.

    The optimum (`LossSurface.optimum`) has ``N = k h^(beta / (alpha + beta))`` and ``D = h^(alpha / (alpha + beta)) / k``
    with ``h = C / 6`` and ``ln k = ln(alpha A / beta B) / (alpha + beta)``. Both terms then fall with the same power
    ``alpha beta / (alpha + beta)`` of h, and ``A k^-alpha + B k^beta`` is their scale. Constants are E, A, B, shape
    ``(draws, 3)``; exponents are alpha, beta, shape ``(draws, 2)``.
    """
    # NaN or infinite where an exponent is not positive; the caller masks those draws.
    floor, alpha, beta = constants[:, 0], exponents[:, 0], exponents[:, 1]
    power = alpha * beta / (alpha + beta)
    log_k = (np.log(alpha * constants[:, 1]) - np.log(beta * constants[:, 2])) / (alpha + beta)
    # Summed as logarithms: A and k^-alpha alone can leave the range of floats in extreme draws.
    log_terms = np.logaddexp(np.log(constants[:, 1]) - alpha * log_k, np.log(constants[:, 2]) + beta * log_k)
    # From powers of h = C / 6 in FLOPs to powers of C in PFLOP/s-days.
    return log_terms - power * (FLOPS_LEVEL - np.log(6.0)), power, floor


class LawForm(NamedTuple):
    """A row of `LAWS`: the terms of a law, and everything that differs from one law to another."""

    label: str
    terms: tuple[tuple[str, ...], ...]
    """Columns of the table that each term is a product of powers of; the empty term is the floor."""
    example: Law | None = None
    """A plausible value, from which tests and plans draw points."""
    build: Callable[[Array, Array], Law] | None = None
    """The value from the constants (one a term, in units of the table) and the exponents (in the order of terms); a
    `TermSum` when not given."""
    best_split: Callable[[Array, Array], Frontier] | None = None
    """The law of compute at the best split of compute, for forms over several columns."""
    objective: Objective = LEAST_SQUARES
    """Minimised unless another is requested."""
    uses_checkpoints: bool = False
    """Every checkpoint of a run is fitted, not only its end."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that the form reads."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term))

    @property
    def size(self) -> int:
        """Number of free parameters."""
        return sum(1 + len(term) for term in self.terms)

    @property
    def has_floor(self) -> bool:
        """True if a constant term is fitted."""
        return () in self.terms

    @property
    def design(self) -> Literal["ladder", "grid"]:
        """The runs that the form needs: one allocation at each compute, or several for forms over several columns."""
        return "ladder" if len(self.columns) == 1 else "grid"

    @property
    def has_frontier(self) -> bool:
        """True if the form gives a law of compute, and with it a ratio."""
        return self.best_split is not None or (self.design == "ladder" and sum(map(bool, self.terms)) == 1)

    def law(self, constants: Array, exponents: Array, ladder: Ladder) -> Law:
        """The value from one vector of constants, shape ``(terms,)``, and one of exponents, shape ``(columns,)``."""
        if self.build is not None:
            return self.build(constants, exponents)
        return TermSum(
            terms=[list(names) for names in self.terms],
            constants=[float(value) for value in constants],
            exponents=[float(value) for value in exponents],
            ladder=dict(ladder),
        )

    def draws(self, constants: Array, exponents: Array, ladder: Ladder) -> dict[str, Array]:
        """Parameters of resampled laws by name, each of shape ``(draws,)``, on the scale of `Law.parameters`.

        Constants have the shape ``(draws, terms)``, exponents ``(draws, columns)``.
        """
        # Law by law, so that a resample is on exactly the scale of the value; extreme resamples may overflow.
        with np.errstate(all="ignore"):
            rows = [self.law(c, e, ladder).parameters() for c, e in zip(constants, exponents, strict=True)]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def frontier(self, constants: Array, exponents: Array, ladder: Ladder) -> Frontier:
        """The law of compute for each draw: at the best split, or along the ladder. Shapes as in `draws`."""
        if self.best_split is not None:
            return self.best_split(constants, exponents)
        return along_ladder(self.terms, constants, exponents, ladder)


def _power(constants: Array, exponents: Array) -> PowerLaw:
    """The law from a constant of a power of FLOPs, after a floor where there is one."""
    scale = constants[-1] * flops_from_pflops_days(1.0) ** -exponents[0]
    floor = float(constants[0]) if len(constants) > 1 else 0.0
    return PowerLaw(scale=float(scale), exponent=float(exponents[0]), floor=floor)


def _surface(constants: Array, exponents: Array) -> LossSurface:
    E, A, B = (float(value) for value in constants)
    return LossSurface(E=E, A=A, B=B, alpha=float(exponents[0]), beta=float(exponents[1]))


LAWS: Registry[LawForm] = Registry(
    "law",
    "laws",
    {
        "power": LawForm(
            label="a C^-b", terms=(("flops",),), example=PowerLaw(scale=2.608424, exponent=0.0544148), build=_power
        ),
        "power-floor": LawForm(
            label="E + a C^-b",
            terms=((), ("flops",)),
            example=PowerLaw(scale=0.92, exponent=0.155, floor=1.69),
            build=_power,
        ),
        "surface": LawForm(
            label="E + A N^-alpha + B D^-beta",
            terms=((), ("params",), ("tokens",)),
            example=LossSurface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
            build=_surface,
            best_split=surface_frontier,
            objective=HUBER,
            uses_checkpoints=True,
        ),
    },
)
"""Forms of the loss by name, the simplest of each design first."""
