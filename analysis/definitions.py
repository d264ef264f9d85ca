"""Numbers that have been called "the ratio", each under its own name.

One set of ten runs gives 0.44 to 0.54, depending on where and how the ratio is read. A definition here says both.
"""

from __future__ import annotations

import numpy as np

from analysis.cells import Cells
from analysis.fit import Fit
from analysis.laws import PowerLaw
from analysis.match import Support, at_loss, compute_law, support
from analysis.paired import Difference, cell_means
from scaling.spec import Strict


class Definition(Strict, frozen=True):
    """One way to read a ratio off the runs."""

    name: str
    text: str
    """What was done, in a sentence."""
    ratio: float
    low: float | None
    high: float | None
    interval: str
    """How `low` and `high` were made; empty where there are none."""
    loss: float
    baseline_compute: float
    """PFLOP/s-days."""
    challenger_compute: float
    support: Support


ARROW = "paper's arrow"
"""Name of Moonlight's own definition."""


def arrow(baseline: Fit, challenger: Fit, cells: Cells) -> Definition | None:
    """Moonlight's rule: ``(L_challenger / L_baseline) ** (1 / exponent of the baseline)`` at the largest shared cell.

    One pair of runs and one fitted exponent. None where the arms share no cell or the baseline's law has a floor.
    """
    law = baseline.law
    if not isinstance(law, PowerLaw) or law.floor or not len(cells.paired):
        return None
    one, x = cell_means(cells, 0)
    two, other = cell_means(cells, 1)
    same = np.abs(x - other) <= 0.02
    if not same.any():
        return None
    top = x[same] >= x[same].max() - 0.02
    gap = float((two[same][top] - one[same][top]).mean())
    compute, loss = float(np.exp(x[same][top].mean())), float(np.exp(two[same][top].mean()))
    ratio = float(np.exp(gap / law.exponent))
    return Definition(
        name=ARROW,
        text="(challenger's loss / baseline's loss)^(1 / baseline's exponent) for the pair of runs at the largest "
        "compute that both arms have: one pair, not two laws (Moonlight, arXiv:2502.16982, Fig. 1a)",
        ratio=ratio,
        low=None,
        high=None,
        interval="",
        loss=loss,
        baseline_compute=compute / ratio,
        challenger_compute=compute,
        support=support(baseline, challenger, compute / ratio, compute),
    )


def at_largest(baseline: Fit, challenger: Fit, difference: Difference | None) -> list[Definition]:
    """The laws read at the largest run of each arm.

    At the challenger's, with the t interval of the paired difference line: the exponent of the baseline's law is then
    taken as it was fitted, which is what makes this interval narrower than the headline's.
    """
    b, c = compute_law(baseline.law), compute_law(challenger.law)
    found = []
    for who, loss in (
        ("challenger", c.loss(challenger.compute_range[1])),
        ("baseline", b.loss(baseline.compute_range[1])),
    ):
        if loss <= max(b.floor, c.floor):
            continue
        point = at_loss(baseline, challenger, loss)
        low = high = None
        if difference is not None and who == "challenger":
            half = difference.at(point.challenger_compute)[1]
            moved = [c.loss(challenger.compute_range[1]) * float(np.exp(sign * half)) for sign in (-1.0, 1.0)]
            if min(moved) > b.floor:
                low, high = (point.challenger_compute / b.compute(value) for value in moved)
        found.append(
            Definition(
                name=f"laws at the {who}'s largest run",
                text=f"the two fitted laws at the loss that the {who}'s law has at its largest compute",
                ratio=point.ratio,
                low=low,
                high=high,
                interval="t interval of the paired difference line, the baseline's exponent taken as fitted"
                if low is not None
                else "",
                loss=loss,
                baseline_compute=point.baseline_compute,
                challenger_compute=point.challenger_compute,
                support=point.support,
            )
        )
    return found
