"""Sentences about a study, the same in the terminal and in the report."""

from __future__ import annotations

from analysis.fitting.families import LAW_FAMILIES
from analysis.fitting.fit import Fit
from analysis.ratio.compare import Comparison
from analysis.ratio.cost_metrics import TIMES
from analysis.ratio.definitions import ARROW
from analysis.ratio.formatting import interval_text, law_text, ratio_text
from analysis.ratio.match import compute_law
from analysis.ratio.moonlight import MOONLIGHT_ARROW
from analysis.ratio.study import Study

MOONLIGHT_RATIO = 0.52
"""Moonlight's "about 52 %" of the FLOPs (arXiv:2502.16982, sec. 3.2)."""

SMALL_COMPUTE = 1e-2
"""PFLOP/s-days: a twentieth of the smallest of the paper's runs."""


def headline_text(comparison: Comparison) -> str:
    """The answer in one sentence."""
    point = comparison.headline
    interval = "" if point.low is None else f" (95 % interval {interval_text(point.low, point.high)})"
    where = {
        "interpolated": "the lowest loss that the runs of both arms reach",
        "half-extrapolated": "a loss that one arm's runs do not reach: half-extrapolated",
        "extrapolated": "a loss that neither arm's runs reach: extrapolated",
    }[point.support]
    return (
        f"{comparison.challenger} needs {ratio_text(point.ratio)} times the FLOPs of {comparison.baseline}{interval} "
        f"at loss {point.loss:.3f}, {where}."
    )


def explanation(study: Study, comparison: Comparison) -> list[str]:
    """Sentences that qualify the headline: law, interval, spread over laws, trend, times."""
    laws = "; ".join(f"{arm} {law_text(fit.law)}" for arm, fit in comparison.fits.items())
    lines = [f"Law: {comparison.family}, {LAW_FAMILIES[comparison.family].label}: {laws}; {comparison.reason}."]
    lines.append(f"Interval: {comparison.interval}.")
    if any(point.support != "interpolated" for point in comparison.rungs):
        lines.append(
            "Values marked extrapolated rest on a law beyond the runs it was fitted to, where no run can confirm it and "
            "laws that agree inside the data differ."
        )
    ratios = {model.family: model.ratio for model in comparison.models if model.ratio is not None}
    if len(ratios) > 1:
        ends = min(ratios, key=lambda family: ratios[family]), max(ratios, key=lambda family: ratios[family])
        spread = " to ".join(f"{ratio_text(ratios[family])} ({family})" for family in ends)
        lines.append(f"Other laws at the same loss: {spread}; this spread is not in the interval.")
    line = comparison.difference
    if line is not None and line.p < 0.05 and study.design == "ladder":
        shrinks = line.slope * line.level < 0
        floors = max(compute_law(fit.law).floor for fit in comparison.fits.values())
        with_floor = "the floor of this law accounts for part of that; without a floor " if floors > 0 else ""
        lines.append(
            f"The arms' difference in log loss {'shrinks' if shrinks else 'grows'} with compute inside these runs "
            f"(p = {line.p:.2g}, paired t test on {line.cells} cells); {with_floor}the ratio "
            f"{'rises towards' if shrinks else 'moves away from'} 1."
        )
    for found in comparison.definitions:
        if found.name == ARROW:
            published = f" Moonlight prints {MOONLIGHT_ARROW}." if study.table.startswith("Moonlight") else ""
            lines.append(
                f"The paper's arrow (one pair of runs at the largest compute, {comparison.baseline}'s exponent): "
                f"{found.ratio:.5f}, {found.support}.{published}"
            )
    for price in comparison.conventions:
        if price.column in TIMES:
            interval = "" if price.low is None else f" ({interval_text(price.low, price.high)})"
            lines.append(f"In {price.label} the ratio is {ratio_text(price.ratio)}{interval}.")
    prices = {price.column for price in comparison.conventions}
    if "cpu_seconds" in prices and "seconds" not in prices:
        lines.append("No ratio in wall-clock: these runs shared their processors with other work, in unequal shares.")
    for worth in comparison.factors:
        lines.append(
            f"One token of {worth.arm} is worth {worth.tokens.value:.3g} ({worth.tokens.low:.3g} to {worth.tokens.high:.3g}) of "
            f"{comparison.baseline}'s, one parameter {worth.params.value:.3g} ({worth.params.low:.3g} to {worth.params.high:.3g})."
        )
    lines += beside_the_paper(comparison)
    return lines + comparison.remarks


def beside_the_paper(comparison: Comparison) -> list[str]:
    """Limits of a comparison with Moonlight's ratio of Muon against AdamW; empty for other arms."""
    ratio = comparison.headline.ratio
    baseline = comparison.baseline.lower()
    if {baseline, comparison.challenger.lower()} != {"adamw", "muon"}:
        return []
    published = MOONLIGHT_RATIO if baseline == "adamw" else 1.0 / MOONLIGHT_RATIO
    near = 0.8 < ratio / published < 1.25
    compute = max(comparison.headline.baseline_compute, comparison.headline.challenger_compute)
    if compute < SMALL_COMPUTE:
        text = f"This differs from Moonlight's {published:.2f}, as expected"
        if near:
            text = f"Agreement with Moonlight's {published:.2f} confirms nothing"
        return [
            f"{text}: these runs spend at most {compute * 8.64e19:.2g} FLOPs where the paper's spend 1.8e19 to 3.5e20. "
            "With few steps and narrow layers the ratio measures early training, and it does not carry over to the scale at "
            "which models are trained."
        ]
    if near:
        return []
    return [
        f"This differs from Moonlight's {published:.2f}. The ratio depends on model, data and tuning, and agreement is "
        "expected only where they are the paper's."
    ]


def left_out_text(study: Study) -> list[str]:
    """The rows that were not used, with the reasons."""
    if not study.left_out:
        return []
    lines = [f"Left out of the fits: {len(study.left_out)} entries."]
    lines += [f"  row {out.row} ({out.arm}): {out.reason}" for out in study.left_out[:10]]
    return lines + ([f"  and {len(study.left_out) - 10} more in fits.json"] if len(study.left_out) > 10 else [])


def fit_text(fit: Fit) -> str:
    """One arm's law in two lines."""
    certificate = fit.certificate
    return (
        f"{fit.arm}: L = {law_text(fit.law)}\n"
        f"  {fit.points} runs, {fit.objective.describe()}, {fit.status.replace('_', ' ')}; "
        f"{certificate.agreeing:.0%} of {certificate.starts} starts agree, gap {certificate.gap:.1g}, "
        f"root mean square error {fit.rms:.2%}." + (f"\n  {fit.remark}" if fit.remark else "")
    )
