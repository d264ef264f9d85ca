"""The verb `compare`: final losses of arms at one budget, and their difference along the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.cli.common import print_json, rich_table
from scaling.cli.tables import OnTable
from scaling.errors import plain
from scaling.io import write_atomic
from scaling.units import human

if TYPE_CHECKING:
    import pandas as pd

    from analysis.single_arm.same_budget import BudgetOutcome, Overtaking


@dataclass(frozen=True)
class Compare(OnTable):
    """Compare arms at equal budgets: held-out losses, paired differences over seeds, and figures."""

    json: bool = False
    """Print JSON with all digits."""

    def run(self) -> None:
        """Print the table; write the figures where the results of this table are."""
        from analysis.figures.registry import FigureInputs, save_figures
        from analysis.ratio.study import choose_arms
        from analysis.reporting.tables import Table, markdown_table, markdown_text
        from analysis.single_arm.same_budget import gaps, outcomes, overtakings
        from scaling.console import console

        table = self.read()
        arms = choose_arms(table, self.baseline, self.challenger)
        found = outcomes(table, arms)
        if self.json:
            print_json(found)
            return
        folder = self.results()
        curves = _read(folder / "curves.parquet")
        if curves is not None:  # names of rungs are printed, and only those of the table were checked
            curves = curves[curves["rung"].astype(str).isin({outcome.rung for outcome in found})]
        along = None if curves is None else gaps(curves, baseline=arms[0])
        crossings = [] if curves is None else [_sentence(one) for one in overtakings(curves, arms)]
        head, rows = _cells(found, arms[0])
        spread = head.index("sd")  # left out, so that the table fits into 80 columns
        shown = [row[:spread] + row[spread + 1 :] for row in (head, *rows)]
        console().print(rich_table(shown[0], shown[1:], left=2))
        for line in crossings:
            print(plain(line))
        caption = "Held-out loss in nats per token; sd and 95 % t intervals over seeds, differences paired by seed."
        text = markdown_table(Table(caption, head, rows)) + "".join(f"\n{markdown_text(line)}\n" for line in crossings)
        write_atomic(folder / "compare.md", text.encode())
        print(f"Wrote {folder / 'compare.md'}")
        inputs = FigureInputs(outcomes=found, gaps=along, curves=curves, dynamics=_read(folder / "dynamics.parquet"))
        for figure in save_figures(inputs, folder / "figures"):
            print(f"Wrote {figure.file}")


def _read(file: Path) -> pd.DataFrame | None:
    import pandas as pd

    return pd.read_parquet(file) if file.exists() else None


def _cells(found: Sequence[BudgetOutcome], baseline: str) -> tuple[list[str], list[list[str]]]:
    def signed(value: float | None) -> str:
        return "" if value is None else f"{value:+.4f}"

    return ["rung", "arm", "tokens", "seeds", "loss", "sd", f"minus {baseline}", "95 %"], [
        [
            outcome.rung,
            outcome.arm,
            human(outcome.tokens),
            str(outcome.seeds),
            f"{outcome.loss:.4f}",
            "" if outcome.spread is None else f"{outcome.spread:.4f}",
            signed(outcome.difference),
            "" if outcome.low is None else f"{signed(outcome.low)} to {signed(outcome.high)}",
        ]
        for outcome in found
    ]


def _sentence(found: Overtaking) -> str:
    return (
        f"At {found.rung}, {found.arm} overtakes {found.other} after {human(found.tokens)} tokens, stays below, and ends "
        f"{-found.gap:.4f} below (95 % {-found.high:.4f} to {-found.low:.4f})."
    )
