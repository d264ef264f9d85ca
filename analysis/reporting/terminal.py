"""A study as text for the terminal: laws, ratio with its interval, the paper's arrow, and plain sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.fitting.fit import Fit
from analysis.moonlight import MOONLIGHT_ARROW
from analysis.ratio.compare import Comparison
from analysis.ratio.cost_metrics import TIMES
from analysis.ratio.definitions import ARROW
from analysis.ratio.formatting import compute_unit, interval_text, law_text, ratio_text
from analysis.ratio.match import MatchRatio, compute_law
from analysis.ratio.study import Study

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.single_arm.fit_arm import ArmFit


PAPER = 0.52
"""Moonlight's "about 52 %" of the FLOPs (arXiv:2502.16982, sec. 3.2)."""

FAR_BELOW = 1e-2
"""PFLOP/s-days: a twentieth of the smallest of the paper's runs."""


def show(study: Study, console: Console | None = None) -> None:
    """Print the study."""
    from rich import box
    from rich.table import Table

    from scaling.console import console as plain_console

    # Names of arms and files are text: square brackets in them are no markup and colons no emoji.
    console = console or plain_console(highlight=False, soft_wrap=True, force_jupyter=False)
    console.print(study.table, style="bold", markup=False)
    table = Table(box=box.SIMPLE_HEAD, title=None, pad_edge=False)
    for title in ("arm alone", "law (C in PFLOP/s-days)", "runs", "error", "fit"):
        table.add_column(title, justify="right" if title in ("runs", "error") else "left")
    for fit in study.fits.values():
        table.add_row(fit.arm, law_text(fit.law), str(fit.points), f"{fit.rms:.2%}", fit.status.replace("_", " "))
    console.print(table)
    for comparison in study.comparisons:
        _show_comparison(study, comparison, console)
    for line in left_out_text(study):
        console.print(line, markup=False)


def _show_comparison(study: Study, comparison: Comparison, console: Console) -> None:
    from rich import box
    from rich.table import Table

    console.print(headline_text(comparison), style="bold", markup=False)
    note = f"C in {compute_unit(comparison)[0]}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note, caption_justify="left")
    for title in point_header(comparison):
        table.add_column(title, justify="left" if title in ("support", "95 % interval") else "right", overflow="fold")
    for point in sorted([*comparison.rungs, comparison.headline], key=lambda point: -point.loss):
        style = None if point.support == "interpolated" else "dim"
        table.add_row(*point_cells(comparison, point), style=style)
    console.print(table)
    for line in explanation(study, comparison):
        console.print(line, markup=False)
    console.print()


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
    """What a reader must know beside the headline, a sentence or two each."""
    laws = "; ".join(f"{arm} {law_text(fit.law)}" for arm, fit in comparison.fits.items())
    lines = [f"Law: {comparison.family}, {_label(comparison)}: {laws}; {comparison.reason}."]
    lines.append(f"Interval: {comparison.interval}.")
    if any(point.support != "interpolated" for point in comparison.rungs):
        lines.append(
            "Values marked extrapolated rest on a law beyond the runs it was fitted to: nobody has trained there, and "
            "laws that agree inside the data part outside."
        )
    spread = [model for model in comparison.models if model.ratio is not None]
    if len(spread) > 1:
        low, high = min(spread, key=lambda m: m.ratio or 0.0), max(spread, key=lambda m: m.ratio or 0.0)
        lines.append(
            f"Other laws at the same loss: {ratio_text(low.ratio or 0.0)} ({low.family}) to "
            f"{ratio_text(high.ratio or 0.0)} ({high.family}); this spread is not in the interval."
        )
    line = comparison.difference
    if line is not None and line.p < 0.05 and study.design == "ladder":
        shrinks = line.slope * line.level < 0
        floors = max(compute_law(fit.law).floor for fit in comparison.fits.values())
        meaning = (
            "the floor of the law taken here accounts for some of that, and without one it is a ratio that "
            if floors > 0
            else "that is a ratio that "
        )
        lines.append(
            f"The arms' difference in log loss {'shrinks' if shrinks else 'grows'} with compute inside these runs "
            f"(p = {line.p:.2g}, paired t test on {line.cells} cells); {meaning}"
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
        lines.append("No ratio in wall-clock: these runs waited for processors that others used, by unequal shares.")
    for worth in comparison.factors:
        lines.append(
            f"One token of {worth.arm} is worth {worth.tokens.value:.3g} ({worth.tokens.low:.3g} to {worth.tokens.high:.3g}) of "
            f"{comparison.baseline}'s, one parameter {worth.params.value:.3g} ({worth.params.low:.3g} to {worth.params.high:.3g})."
        )
    lines += beside_the_paper(comparison)
    return lines + comparison.remarks


def beside_the_paper(comparison: Comparison) -> list[str]:
    """What Muon against AdamW here has to do with the published 0.52: said whether it comes out near or far."""
    ratio = comparison.headline.ratio
    if not {"adamw", "muon"} <= {comparison.baseline.lower(), comparison.challenger.lower()}:
        return []
    published = PAPER if comparison.baseline.lower() == "adamw" else 1.0 / PAPER
    near = 0.8 < ratio / published < 1.25
    compute = max(comparison.headline.baseline_compute, comparison.headline.challenger_compute)
    if compute < FAR_BELOW:
        text = f"That it lies near Moonlight's {published:.2f} confirms nothing" if near else (
            f"This is nothing like Moonlight's {published:.2f}, and was not expected to be"
        )  # fmt: skip
        return [
            f"{text}: these runs spend at most {compute * 8.64e19:.2g} FLOPs where the paper's spend 1.8e19 to 3.5e20. "
            "With few steps and narrow layers the ratio measures how fast an optimizer gets started; it says nothing "
            "about the scale at which models are trained."
        ]
    if near:
        return []
    return [
        f"This is nothing like Moonlight's {published:.2f}, and need not be unless model, data and tuning are the paper's: "
        "the ratio belongs to the set-up, not to the name."
    ]


def point_header(comparison: Comparison) -> list[str]:
    """The header of a table of ratios; the unit of C is `compute_unit`."""
    return ["loss", f"C {comparison.baseline}", f"C {comparison.challenger}", "ratio", "95 % interval", "support"]


def point_cells(comparison: Comparison, point: MatchRatio) -> list[str]:
    """One ratio as the cells of a table: loss, both computes, ratio, interval, support."""
    size = compute_unit(comparison)[1]
    return [
        f"{point.loss:.4f}",
        f"{point.baseline_compute * size:.4g}",
        f"{point.challenger_compute * size:.4g}",
        ratio_text(point.ratio),
        interval_text(point.low, point.high),
        point.support,
    ]


def left_out_text(study: Study) -> list[str]:
    """The rows that were not used, with the reasons."""
    if not study.left_out:
        return []
    lines = [f"Left out of the fits: {len(study.left_out)} entries."]
    lines += [f"  row {out.row} ({out.arm}): {out.reason}" for out in study.left_out[:10]]
    return lines + ([f"  and {len(study.left_out) - 10} more in fits.json"] if len(study.left_out) > 10 else [])


def _label(comparison: Comparison) -> str:
    from analysis.fitting.families import LAW_FAMILIES

    return LAW_FAMILIES[comparison.family].label


def fit_text(fit: Fit) -> str:
    """One arm's law in two lines."""
    certificate = fit.certificate
    return (
        f"{fit.arm}: L = {law_text(fit.law)}\n"
        f"  {fit.points} runs, {fit.objective.describe()}, {fit.status.replace('_', ' ')}; "
        f"{certificate.agreeing:.0%} of {certificate.starts} starts agree, gap {certificate.gap:.1g}, "
        f"root mean square error {fit.rms:.2%}." + (f"\n  {fit.remark}" if fit.remark else "")
    )


def arm_text(found: ArmFit) -> str:
    """One arm's law with its errors, the other loss functions and the points that move it most."""
    lines = [fit_text(found.fit)]
    if found.fit.status == "not_identified":
        return "\n".join(lines)  # numbers that the runs do not determine help nobody
    if found.resamples:
        lines.append(
            f"  {found.resamples:,} resamples of {found.units} {found.unit}; effective rows {found.effective:.0f}"
        )
        lines += [
            f"  {p.name:>22} {p.value:12.6g}  error {p.error:.3g}  "
            + (f"95 % {p.low:.5g} to {p.high:.5g}" if p.error > 1e-12 * abs(p.value) else "no interval: no noise")
            for p in found.parameters
        ]
    if found.variants:
        lines.append("  the same points under other loss functions:")
        lines += [f"  {variant.objective:>40}: {law_text(variant.law)}" for variant in found.variants]
    if found.influence:
        lines.append("  points that move the fit most when left out:")
        for item in found.influence[:3]:
            moved = ", ".join(f"{key} {value:+.3g}" for key, value in item.moves.items())
            lines.append(f"    row {item.row} (residual {100 * item.residual:+.2f} %): {moved}")
    lines += [f"  left out: row {out.row}: {out.reason}" for out in found.left_out[:10]]
    return "\n".join(lines)
