"""A study printed to the terminal: laws, ratios with their intervals, and the sentences that qualify them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.ratio.formatting import law_text
from analysis.ratio.study import Study
from analysis.reporting.sentences import explanation, fit_text, headline_text, left_out_text
from analysis.reporting.tables import Table, cell_text, law_table, match_table

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.single_arm.fit_arm import ArmFit


def show(study: Study, console: Console | None = None) -> None:
    """Print the study."""
    from scaling.console import console as plain_console

    # Names of arms and files are text: square brackets in them are no markup and colons no emoji.
    console = console or plain_console(highlight=False, soft_wrap=True, force_jupyter=False)
    console.print(study.table, style="bold", markup=False)
    _print(law_table(study), console)
    for comparison in study.comparisons:
        console.print(headline_text(comparison), style="bold", markup=False)
        _print(match_table(comparison), console)
        for line in explanation(study, comparison):
            console.print(line, markup=False)
        console.print()
    for line in left_out_text(study):
        console.print(line, markup=False)


def arm_text(found: ArmFit) -> str:
    """One arm's law with its errors, the other loss functions and the points that move it most."""
    lines = [fit_text(found.fit)]
    if found.fit.status == "not_identified":
        return "\n".join(lines)  # the runs do not determine the numbers below
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


def _print(table: Table, console: Console) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, caption=Text(table.caption), caption_justify="left")
    for number, title in enumerate(table.head):
        shown.add_column(Text(title), justify="left" if number in table.left else "right", overflow="fold")
    for row, muted in zip(table.rows, table.muted or [False] * len(table.rows), strict=True):
        shown.add_row(*(Text(cell_text(cell)) for cell in row), style="dim" if muted else None)
    console.print(shown)
