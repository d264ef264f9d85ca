"""Named coefficient sets of the Newton-Schulz iteration, and the FLOPs of its matrix products. Imports no torch.

One step maps a matrix ``X`` to ``a X + b (X X^T) X + c (X X^T)^2 X``: every singular value ``s`` becomes
``a s + b s^3 + c s^5`` and the singular vectors stay. The sets differ in how fast small singular values grow and how
near to one the large ones settle; tests/scaling/optim/test_newton_schulz.py checks the bands.
"""

from __future__ import annotations

from typing import Literal

Step = tuple[float, float, float]
CoefficientSet = Literal["keller", "polar-express", "deepseek"]
Form = Literal["standard", "gram"]
"""``gram`` iterates on square matrices of the short side (`scaling.optim.newton_schulz.gram_form`) where it saves work."""

GRAM_ASPECT = 2
"""Long side over short side from which the Gram form is used: below it costs more products than it saves."""
GRAM_RESTART = 2
"""Steps after which the Gram form first returns to the matrix itself, so that its rounding errors do not grow."""

KELLER: Step = (3.4445, -4.7750, 2.0315)

_POLAR_EXPRESS: tuple[Step, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01
"""Polar Express divides the singular values that each polynomial expects by this, so that rounding cannot leave them."""

COEFFICIENTS: dict[CoefficientSet, tuple[Step, ...]] = {
    # Keller Jordan's Muon and Moonlight's Eq. 2: the steepest start that stays bounded; it does not converge to one.
    "keller": (KELLER,),
    # Minimax polynomials (arXiv:2505.16932), with the paper's safety factor on all but the last.
    "polar-express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]),
        _POLAR_EXPRESS[-1],
    ),
    # DeepSeek-V4: eight steep steps, then two that draw the singular values to one. Meant for ns_steps = 10.
    "deepseek": (*(KELLER,) * 8, (2.0, -1.5, 0.5)),
}
"""Polynomials in order; the last one is repeated for further steps."""


def polynomials(name: CoefficientSet, steps: int) -> tuple[Step, ...]:
    """The `steps` polynomials of a set, the last repeated."""
    table = COEFFICIENTS[name]
    return tuple(table[min(step, len(table) - 1)] for step in range(steps))


def newton_schulz_flops(rows: int, columns: int, steps: int, form: Form = "standard") -> int:
    """FLOPs of the matrix products that orthogonalise one matrix, two per multiplication and addition.

    With ``m`` the shorter and ``n`` the longer side: ``2 m^2 n`` for the Gram matrix, ``2 m^3`` for its square and
    ``2 m^2 n`` to apply the polynomial, each step. The Gram form pays the long products once for each of
    `gram_runs` and up to four of ``2 m^3`` for each step. Panels of one triangle need fewer; the count is of the
    mathematics, so that it does not depend on the machine.
    """
    short, long = sorted((rows, columns))
    if form == "standard" or long < GRAM_ASPECT * short:
        return steps * (4 * short**2 * long + 2 * short**3)
    runs = gram_runs(steps)
    squares = sum(4 * length - 3 for length in runs)
    return len(runs) * 4 * short**2 * long + squares * 2 * short**3


def gram_runs(steps: int) -> tuple[int, ...]:
    """Numbers of steps that the Gram form takes before each return to the matrix: 2, then 3 at a time.

    The first steps are the steepest and amplify rounding most.
    """
    runs = [min(steps, GRAM_RESTART)]
    while sum(runs) < steps:
        runs.append(min(steps - sum(runs), GRAM_RESTART + 1))
    return tuple(runs)
