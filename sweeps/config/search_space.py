"""Search dimensions of a study, and the conversion between hyper-parameter values and run specs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.optim.registry import OPTIMIZERS
from scaling.optim.search_space import SHARED, SearchRange
from scaling.spec import RunSpec

Values = dict[str, float]
"""Hyper-parameters by name. ``warmup`` is a share of the run's tokens, ``final_fraction`` one of the peak."""

DIGITS = 4
"""Significant digits of a tried value: more make no difference to a loss, and specs are read by people."""

PRIOR_SPREAD = 8.0
"""Factor below and above a rule's prediction that the initial range covers."""


class Dimension(msgspec.Struct, frozen=True, kw_only=True):
    """One searched hyper-parameter of one study: a range, or listed values in rising order."""

    search: SearchRange
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Name of the hyper-parameter."""
        return self.search.name

    @property
    def span(self) -> tuple[float, float]:
        """Positions of both ends on the scale."""
        ends = (self.values[0], self.values[-1]) if self.values else (self.search.low, self.search.high)
        return self.search.position(ends[0]), self.search.position(ends[1])

    def at(self, share: float, context: int) -> float:
        """The value at a share of the way through the range, rounded by `rounded`."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.span
        return self.rounded(self.search.value(low + share * (high - low)), context)

    def rounded(self, value: float, context: int) -> float:
        """A value with a few digits; a batch is a number of whole sequences with small divisors."""
        if self.name == "batch_tokens":
            sequences = max(1.0, value / context)
            power = 2 ** math.floor(math.log2(sequences))
            near = min((power, 1.5 * power, 2 * power), key=lambda count: abs(math.log(sequences / count)))
            return float(math.ceil(near) * context)
        return min(max(float(f"{value:.{DIGITS}g}"), self.search.least), self.search.most)

    def widened(self, *, down: bool) -> Dimension | None:
        """The range extended by half its width on one side; None at the limit, and for listed values."""
        low, high = self.span
        limit = self.search.position(self.search.least if down else self.search.most)
        end = max(low - (high - low) / 2, limit) if down else min(high + (high - low) / 2, limit)
        if self.values or abs(end - (low if down else high)) < 1e-9:
            return None
        value = float(f"{self.search.value(end):.{DIGITS}g}")
        value = min(max(value, self.search.least), self.search.most)
        changed = {"low": value} if down else {"high": value}
        return msgspec.structs.replace(self, search=msgspec.structs.replace(self.search, **changed))


def known_searches(optimizer: str) -> dict[str, SearchRange]:
    """Search ranges of every hyper-parameter that can be tuned with an optimizer, by name."""
    return {row.name: row for row in (*OPTIMIZERS.row(optimizer).search, *SHARED)}


def centred(row: SearchRange, expected: float) -> SearchRange:
    """The search range moved around the prediction of a rule."""
    low = max(row.least, expected / PRIOR_SPREAD)
    high = min(row.most, expected * PRIOR_SPREAD)
    return msgspec.structs.replace(row, low=low, high=high)


def with_values(spec: RunSpec, values: Mapping[str, float]) -> RunSpec:
    """The spec with the given hyper-parameters in place of its own.

    Raises:
        ConfigError: The optimizer has no hyper-parameter of a name, or the spec does not accept the value.
    """
    options = dict(spec.optimizer.options)
    optimizer: dict[str, float] = {}
    schedule: dict[str, int | float] = {}
    changed: dict[str, int] = {}
    for name, value in values.items():
        if name in ("peak_lr", "weight_decay"):
            optimizer[name] = float(value)
        elif name == "batch_tokens":
            changed[name] = round(value)
        elif name == "warmup":
            schedule["warmup_tokens"] = round(value * spec.budget.tokens)
        elif name == "final_fraction":
            schedule["final_fraction"] = float(value)
        elif name in options:
            options[name] = type(options[name])(value)
        else:
            known = ["peak_lr", "weight_decay", *(row.name for row in SHARED), *options]
            raise ConfigError(unknown_name(f"hyper-parameter of {spec.optimizer.name}", name, known))
    replace = msgspec.structs.replace
    return replace(
        spec,
        optimizer=replace(spec.optimizer, options=options, **optimizer),
        schedule=replace(spec.schedule, **schedule),
        **changed,
    )
