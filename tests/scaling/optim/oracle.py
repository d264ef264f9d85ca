"""Newton-Schulz on a single number, in exact arithmetic up to float64."""

from collections.abc import Sequence

from scaling.optim.newton_schulz.coefficients import Step


def singular_value_after(value: float, steps: Sequence[Step]) -> float:
    for a, b, c in steps:
        value = a * value + b * value**3 + c * value**5
    return value
