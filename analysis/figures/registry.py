"""Figure registry: one row a figure, drawn wherever its values are there.

`report`, `compare` and `design` all draw through `save_figures`. A package adds a figure by an entry point in the group
``scaling_harness.figures`` (`scaling.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from analysis.figures.curves import MAX_LINES, training_curves
from analysis.figures.design import width_against_cost
from analysis.figures.dynamics import along_the_run, spectra
from analysis.figures.isoflop import isoflop_valleys, surface_contours
from analysis.figures.laws import loss_against_compute
from analysis.figures.ratio import ratio_curve
from analysis.figures.same_budget import final_losses, gap_curves
from analysis.figures.search import has_bowls, learning_rate_bowls, ratio_by_trials
from analysis.figures.style import arm_label, save
from analysis.ratio.study import Study
from analysis.single_arm.isoflop import Allocations, allocations_text
from analysis.single_arm.same_budget import BudgetOutcome
from scaling.registry import Registry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.power.forecast import DesignForecast


@dataclass(frozen=True, kw_only=True)
class FigureInputs:
    """Values that figures draw; a figure that needs a value which is None is left out."""

    study: Study | None = None
    frame: pd.DataFrame | None = None
    """The checked table that the study was made from."""
    curves: pd.DataFrame | None = None
    """Logged steps, as ``curves.parquet`` has them."""
    dynamics: pd.DataFrame | None = None
    """Measured updates and spectra, as ``dynamics.parquet`` has them."""
    trials: pd.DataFrame | None = None
    """Runs with several learning rates: the search for settings, or the table itself."""
    tuning_budget: pd.DataFrame | None = None
    """The ratio at smaller budgets of the search (`analysis.data.tuning.TuningTables.budget`)."""
    allocations: Sequence[Allocations] | None = None
    """Compute-optimal splits of the arms of a grid."""
    outcomes: Sequence[BudgetOutcome] | None = None
    """Arms at one budget, the baseline first in each rung."""
    gaps: pd.DataFrame | None = None
    """Differences along the runs (`analysis.single_arm.same_budget.gaps`)."""
    forecast: DesignForecast | None = None


class Drawing(NamedTuple):
    """A drawn figure; a row may draw one for each arm, pair or rung."""

    figure: Figure
    subject: str = ""
    """The arm or rung; part of the file's name."""
    detail: str = ""
    """Sentences behind the row's caption."""


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One kind of figure."""

    title: str
    """Short description, and the text that a screen reader speaks in place of the figure."""
    caption: str
    needs: tuple[str, ...]
    """Fields of `FigureInputs` that must not be None; `draw` gets them by name."""
    draw: Callable[..., Iterable[Drawing]]


class SavedFigure(NamedTuple):
    """A figure's SVG file; PDF and PNG lie beside it."""

    file: Path
    title: str
    caption: str
    width: float
    """Inches."""


def save_figures(inputs: FigureInputs, folder: Path) -> Iterator[SavedFigure]:
    """Draw every row of `FIGURES` whose values are there, and write it as SVG, PDF and PNG."""
    for name, row in FIGURES.items():
        values = {field: getattr(inputs, field) for field in row.needs}
        if any(value is None for value in values.values()):
            continue
        for figure, subject, detail in row.draw(**values):
            file = save(figure, folder, f"{name}-{subject}" if subject else name)
            title = f"{row.title}: {arm_label(subject)}" if subject else row.title
            yield SavedFigure(file, title, f"{row.caption} {detail}".strip(), float(figure.get_figwidth()))


def _loss(study: Study, frame: pd.DataFrame) -> Iterator[Drawing]:
    for comparison in study.comparisons:
        subject = comparison.challenger if len(study.comparisons) > 1 else ""
        yield Drawing(loss_against_compute(study, frame, comparison), subject)


def _curves(study: Study, curves: pd.DataFrame) -> Iterator[Drawing]:
    if len(curves):
        most = int(curves.groupby(["rung", "arm"])["run"].nunique().max())
        drawn = f"Of arms with more runs at a rung, {MAX_LINES} are drawn." if most > MAX_LINES else ""
        yield Drawing(training_curves(curves, study.arms), detail=drawn)


def _valleys(study: Study, allocations: Sequence[Allocations]) -> Iterator[Drawing]:
    for found in allocations:
        if len(found.valleys) >= 2:
            yield Drawing(isoflop_valleys(found, study.arms), found.arm, f"\n{allocations_text(found)}")


def _arms(outcomes: Sequence[BudgetOutcome]) -> list[str]:
    return list(dict.fromkeys(outcome.arm for outcome in outcomes))


def _rungs(outcomes: Sequence[BudgetOutcome], table: pd.DataFrame | None = None) -> list[str]:
    """Rungs of the outcomes; with a table, those that have rows in it."""
    rungs = dict.fromkeys(outcome.rung for outcome in outcomes)
    return [rung for rung in rungs if table is None or (table["rung"] == rung).any()]


FIGURES: Registry[FigureRow] = Registry(
    "figure",
    "figures",
    {
        "ratio": FigureRow(
            title="FLOPs to match the baseline against compute",
            caption="FLOPs that reach the baseline's loss, relative to the baseline, against the baseline's compute. "
            "Grey and dashed: at least one law is beyond its runs there. Thin lines: other laws through the same runs.",
            needs=("study",),
            draw=lambda study: [Drawing(ratio_curve(study))],
        ),
        "loss": FigureRow(
            title="Loss against training compute",
            caption="Points are runs, lines are fitted laws, dashed beyond the runs; bands are 95 % intervals of the laws. "
            "The arrow is the headline. Below: observed over fitted loss.",
            needs=("study", "frame"),
            draw=_loss,
        ),
        "curves": FigureRow(
            title="Training curves of the largest rungs",
            caption="Training loss (lines) and held-out loss (points) of the largest rungs.",
            needs=("study", "curves"),
            draw=_curves,
        ),
        "learning-rates": FigureRow(
            title="Loss against peak learning rate",
            caption="The best loss of each peak learning rate. A best rate on the edge of those tried is hollow: it is "
            "no optimum.",
            needs=("study", "trials"),
            draw=lambda study, trials: [Drawing(learning_rate_bowls(trials, study.arms))] if has_bowls(trials) else [],
        ),
        "tuning-budget": FigureRow(
            title="Ratio against the number of trials",
            caption="The ratio if each arm had had only so many trials: the best of the first k, over orders of the "
            "trials; bands hold 95 % of the orders. Dashed: the challenger keeps all of its trials while the baseline "
            "has few.",
            needs=("study", "tuning_budget"),
            draw=lambda study, tuning_budget: (
                [Drawing(ratio_by_trials(tuning_budget, study.arms))] if len(tuning_budget) else []
            ),
        ),
        "surface": FigureRow(
            title="Loss surface",
            caption="Lines of equal loss over parameters and tokens, the runs, and the best split of compute; dotted "
            "lines are equal compute.",
            needs=("study", "frame", "allocations"),
            draw=lambda study, frame, allocations: (
                Drawing(surface_contours(found, frame, study.arms), found.arm) for found in allocations
            ),
        ),
        "valleys": FigureRow(
            title="IsoFLOP valleys",
            caption="Loss against parameters at equal compute. Stars are minima; hollow ones are left out of the law.",
            needs=("study", "allocations"),
            draw=_valleys,
        ),
        "losses": FigureRow(
            title="Held-out loss of each arm",
            caption="Mean held-out loss at the end; bars are 95 % intervals of the paired difference to the baseline.",
            needs=("outcomes",),
            draw=lambda outcomes: (
                Drawing(final_losses(outcomes, _arms(outcomes), rung), rung) for rung in _rungs(outcomes)
            ),
        ),
        "gap": FigureRow(
            title="Held-out loss relative to the baseline along the run",
            caption="Held-out loss minus the baseline's at equal tokens; bands, drawn for up to four arms, are 95 % "
            "intervals over seeds.",
            needs=("outcomes", "gaps"),
            draw=lambda outcomes, gaps: (
                Drawing(gap_curves(gaps, _arms(outcomes), rung), rung) for rung in _rungs(outcomes, gaps)
            ),
        ),
        "dynamics": FigureRow(
            title="Training dynamics",
            caption="Training loss, gradient norm, largest attention logit and update size; thin lines are seeds.",
            needs=("outcomes", "curves", "dynamics"),
            draw=lambda outcomes, curves, dynamics: (
                Drawing(along_the_run(curves, dynamics, _arms(outcomes), rung), rung)
                for rung in _rungs(outcomes, dynamics)
            ),
        ),
        "spectra": FigureRow(
            title="SVD entropy of the weights",
            caption="SVD entropy of each class of matrix: 1 where all singular values are equal.",
            needs=("outcomes", "dynamics"),
            draw=lambda outcomes, dynamics: (
                Drawing(spectra(dynamics, _arms(outcomes), rung), rung) for rung in _rungs(outcomes, dynamics)
            ),
        ),
        "design": FigureRow(
            title="Width of the interval against cost",
            caption="Simulated designs, and the narrowest for their cost.",
            needs=("forecast",),
            draw=lambda forecast: [Drawing(width_against_cost(forecast))],
        ),
    },
)
"""All figures, in the order of the report; the first is on its first screen."""
