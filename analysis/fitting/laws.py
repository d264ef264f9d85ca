"""The forms that a loss may follow, by name, and the values that a fit gives back.

Every form here is a sum of terms, each a constant times powers of columns of the table: ``E + A * N**-alpha + B *
D**-beta`` has three. That is all a fit needs to know about a form (`analysis.fitting.solver`), so a new one is a new row of
`LAWS`. Compute inside a law is in PFLOP/s-days, parameters and tokens are counts, loss is in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.io import Strict
from scaling.units import flops_from_pflops_days, pflops_days

Numbers = TypeVar("Numbers", float, NDArray[np.float64])


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
                "Ask for a loss above the floor."
            )
        compute: Numbers = ((loss - self.floor) / self.scale) ** (-1.0 / self.exponent)
        return compute

    def local_exponent(self, compute: Numbers) -> Numbers:
        """``-d ln loss / d ln compute``: the exponent where the floor is 0, less where it is not."""
        slope: Numbers = self.exponent * (1.0 - self.floor / self.loss(compute))
        return slope


class Allocation(Strict, frozen=True):
    """How a compute is best spent under a surface."""

    flops: float
    params: float
    tokens: float
    loss: float


class LossSurface(Strict, frozen=True, tag="surface"):
    """Loss as a sum of a floor, a shortage of parameters and a shortage of tokens: ``E + A N**-alpha + B D**-beta``.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, approach 3.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: Numbers, tokens: Numbers) -> Numbers:
        """Loss of a model of so many parameters after so many tokens."""
        loss: Numbers = self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta
        return loss

    def optimum(self, flops: float) -> Allocation:
        """The split of ``flops = 6 N D`` with the lowest loss.

        Raises:
            UserError: An exponent is not positive, so that no split is best.
        """
        if min(self.alpha, self.beta) <= 0.0 or min(self.A, self.B) <= 0.0:
            raise UserError(
                f"the surface has exponents {self.alpha:.3g} (parameters) and {self.beta:.3g} (tokens); a best split "
                "of compute needs both above zero. Fit runs that vary both parameters and tokens."
            )
        half = flops / 6.0
        lean = (self.alpha * self.A / (self.beta * self.B)) ** (1.0 / (self.alpha + self.beta))
        params = lean * half ** (self.beta / (self.alpha + self.beta))
        tokens = half / params
        return Allocation(flops=flops, params=params, tokens=tokens, loss=float(self.loss(params, tokens)))

    def frontier(self) -> PowerLaw:
        """Loss of the best split as a law of compute: exactly a power law with floor `E`."""
        exponent = self.alpha * self.beta / (self.alpha + self.beta)
        at_one = self.optimum(flops_from_pflops_days(1.0))
        return PowerLaw(scale=at_one.loss - self.E, exponent=exponent, floor=self.E)


Law = PowerLaw | LossSurface


class LawForm(NamedTuple):
    """A row of `LAWS`: how a form is called, what it is made of, and how its value is built."""

    label: str
    terms: tuple[tuple[str, ...], ...]
    """Columns of the table that each term is a product of powers of; the empty term is the floor."""
    build: Callable[[NDArray[np.float64], NDArray[np.float64]], Law]
    """The value from the constants (one a term, raw units of the table) and the exponents (in the order of terms)."""
    example: Law
    """A plausible value, from which tests and designs draw points."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that the form reads."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term))

    @property
    def size(self) -> int:
        """Number of free parameters."""
        return sum(1 + len(term) for term in self.terms)

    def loss(self, law: Law, columns: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Loss that a value of this form gives at rows of a table."""
        if isinstance(law, LossSurface):
            return np.asarray(law.loss(columns["params"], columns["tokens"]))
        days = np.asarray(pflops_days(1.0) * columns["flops"], dtype=np.float64)
        return np.asarray(law.loss(days))


def _in_days(constant: float, exponent: float) -> float:
    return float(constant * flops_from_pflops_days(1.0) ** -exponent)


def _power(constants: NDArray[np.float64], exponents: NDArray[np.float64]) -> PowerLaw:
    return PowerLaw(scale=_in_days(constants[0], exponents[0]), exponent=float(exponents[0]))


def _power_floor(constants: NDArray[np.float64], exponents: NDArray[np.float64]) -> PowerLaw:
    scale = _in_days(constants[1], exponents[0])
    return PowerLaw(scale=scale, exponent=float(exponents[0]), floor=float(constants[0]))


def _surface(constants: NDArray[np.float64], exponents: NDArray[np.float64]) -> LossSurface:
    E, A, B = (float(value) for value in constants)
    return LossSurface(E=E, A=A, B=B, alpha=float(exponents[0]), beta=float(exponents[1]))


LAWS: dict[str, LawForm] = {
    "power": LawForm(
        label="a C^-b",
        terms=(("flops",),),
        build=_power,
        example=PowerLaw(scale=2.608424, exponent=0.0544148),
    ),
    "power-floor": LawForm(
        label="E + a C^-b",
        terms=((), ("flops",)),
        build=_power_floor,
        example=PowerLaw(scale=0.92, exponent=0.155, floor=1.69),
    ),
    "surface": LawForm(
        label="E + A N^-alpha + B D^-beta",
        terms=((), ("params",), ("tokens",)),
        build=_surface,
        example=LossSurface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
    ),
}
"""Forms of the loss, by the name that the command line takes."""
