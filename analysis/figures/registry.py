"""Which figures a study gets: those that its values carry, each with its caption."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.data.tuning import TuningTables
from analysis.ratio.study import Study
from scaling.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def pictures(
    study: Study, frame: pd.DataFrame, curves: pd.DataFrame | None, search: TuningTables | None
) -> dict[str, tuple[Figure, str]]:
    """Every figure that the values carry, by the name of its file, with its caption.

    Args:
        study: What `analysis.ratio.study.fit_table` gave.
        frame: The checked table it was made from.
        curves: Logged steps, if there are.
        search: What is known of the search for settings, if there was one.
    """
    from analysis.figures.curves import MAX_LINES, training_curves
    from analysis.figures.laws import loss_against_compute
    from analysis.figures.ratio import ratio_curve
    from analysis.figures.search import has_bowls, learning_rate_bowls, tuning_budget
    from analysis.figures.style import slug

    made: dict[str, tuple[Figure, str]] = {}
    for comparison in study.comparisons:
        several = len(study.comparisons) > 1
        name = f"loss-{slug(comparison.challenger)}" if several else "loss"
        made[name] = (
            loss_against_compute(study, frame, comparison),
            "Loss against training compute. Points are runs, lines are fitted laws, dashed beyond the runs; bands are "
            "95 % intervals of the laws. The arrow is the headline. Below: observed over fitted loss.",
        )
    made["ratio"] = (
        ratio_curve(study),
        "FLOPs that reach the baseline's loss, relative to the baseline, against the baseline's compute. Grey and "
        "dashed: at least one law is beyond its runs there.",
    )
    if curves is not None and len(curves):
        most = int(curves.groupby(["rung", "arm"])["run"].nunique().max())
        drawn = f" Of arms with more runs at a rung, {MAX_LINES} are drawn." if most > MAX_LINES else ""
        made["curves"] = (
            training_curves(curves, study.arms),
            f"Training loss (lines) and held-out loss (points) of the largest rungs.{drawn}",
        )
    searched = frame if search is None else search.trials
    if has_bowls(searched):
        made["learning-rates"] = (
            learning_rate_bowls(searched, study.arms),
            "Loss against peak learning rate. A best rate on the edge of what was tried is hollow: it is no optimum.",
        )
    if search is not None and search.budget is not None and len(search.budget):
        made["tuning-budget"] = (
            tuning_budget(search.budget, study.arms),
            "The ratio if each arm had had only so many trials: the best of the first k, over orders of the trials; bands "
            "hold 95 % of the orders. Dashed: the challenger keeps all of its trials while the baseline has few.",
        )
    if study.design == "grid":
        for arm in study.arms:
            made |= _grid_figures(study, frame, arm)
    return made


def _grid_figures(study: Study, frame: pd.DataFrame, arm: str) -> dict[str, tuple[Figure, str]]:
    from analysis.figures.isoflop import isoflop_valleys, surface_contours
    from analysis.figures.style import slug
    from analysis.single_arm.isoflop import allocations, allocations_text

    try:
        found = allocations(frame, arm)
    except UserError:
        return {}
    made = {
        f"surface-{slug(arm)}": (
            surface_contours(found, frame, study.arms),
            f"Lines of equal loss of {arm} over parameters and tokens, its runs, and the best split of compute; dotted "
            "lines are equal compute.",
        )
    }
    if len(found.valleys) >= 2:
        made[f"valleys-{slug(arm)}"] = (isoflop_valleys(found, study.arms), allocations_text(found))
    return made
