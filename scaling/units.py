"""Units of compute. FLOPs inside the code; PFLOP/s-days only through this file."""

from __future__ import annotations

FLOPS_PER_PFLOPS_DAY = 8.64e19
"""FLOPs in one PFLOP/s-day: 1e15 FLOP/s for 86,400 s."""


def pflops_days(flops: float) -> float:
    """Compute in PFLOP/s-days, the unit of Moonlight's Fig. 1a and Table 3."""
    return flops / FLOPS_PER_PFLOPS_DAY


def flops_from_pflops_days(compute: float) -> float:
    """Compute in FLOPs; the inverse of `pflops_days`."""
    return compute * FLOPS_PER_PFLOPS_DAY


def human(count: float) -> str:
    """A count with three significant digits and the field's suffix: ``339.7M``, ``8.92B``, ``26.6k``."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit * 0.9995:
            scaled = count / limit
            return f"{scaled:.{1 if scaled >= 99.95 else 2 if scaled < 9.995 else 1}f}{suffix}"
    return f"{count:g}"


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`, which is 1 or more."""
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)
