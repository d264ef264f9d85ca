"""The verb compare: losses of arms at equal budgets, and their differences during training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.cli.common import print_json
from scaling.cli.tables import OnTable
from scaling.errors import plain
from scaling.io import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from analysis.single_arm.same_budget import BudgetOutcome, Overtaking


@dataclass(frozen=True)
class Compare(OnTable):
    """Compare arms at equal budgets: held-out losses, paired differences over seeds, and figures."""

    json: bool = False
    """Print JSON with all digits."""

    def run(self) -> None:
        """Print the comparison; write it and its figures to the results folder of the table."""
        from analysis.ratio.study import choose_arms
        from analysis.reporting.tables import markdown_table, markdown_text
        from analysis.single_arm.same_budget import gaps, outcomes, overtakings
        from scaling.console import console

        frame = self.read()
        arms = choose_arms(frame, frame.attrs["name"], self.baseline, self.challenger)
        found = outcomes(frame, arms)
        if self.json:
            print_json(found)
            return
        folder = self.results()
        curves = _read(folder / "curves.parquet") if (folder / "curves.parquet").exists() else None
        if curves is not None:  # only the rung names of the table were checked for control characters
            curves = curves[curves["rung"].astype(str).isin({outcome.rung for outcome in found})]
        along = None if curves is None else gaps(curves, baseline=arms[0])
        crossings = [] if curves is None else [_sentence(one) for one in overtakings(curves, arms)]
        head, rows = _cells(found, arms[0])
        console().print(_table(head, rows, without="sd"))
        for line in crossings:
            print(plain(line))
        caption = "Held-out loss in nats per token; sd and 95 % t intervals over seeds, differences paired by seed."
        text = markdown_table((caption, head, rows)) + "".join(f"\n{markdown_text(line)}\n" for line in crossings)
        write_atomic(folder / "compare.md", text.encode())
        measured = _read(folder / "dynamics.parquet") if (folder / "dynamics.parquet").exists() else None
        drawn = _draw(folder / "figures", found, arms, along, curves, measured)
        for path in (folder / "compare.md", *drawn):
            print(f"Wrote {path}")


def _read(file: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(file)


def _cells(found: Sequence[BudgetOutcome], baseline: str) -> tuple[list[str], list[list[str]]]:
    from scaling.units import human

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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, without: str) -> Table:
    """A table for a terminal of 80 columns, which omits one column of the file."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = [number for number, name in enumerate(head) if name != without]
    for number in shown:
        table.add_column(head[number], justify="left" if number < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[number] for number in shown))
    return table


def _sentence(found: Overtaking) -> str:
    from scaling.units import human

    return (
        f"At {found.rung}, {found.arm} overtakes {found.other} after {human(found.tokens)} tokens, stays below, and ends "
        f"{-found.gap:.4f} below (95 % {-found.high:.4f} to {-found.low:.4f})."
    )


def _draw(
    folder: Path,
    found: Sequence[BudgetOutcome],
    arms: Sequence[str],
    along: pd.DataFrame | None,
    curves: pd.DataFrame | None,
    measured: pd.DataFrame | None,
) -> Iterable[Path]:
    from analysis.figures.dynamics import along_the_run, spectra
    from analysis.figures.same_budget import final_losses, gap_curves
    from analysis.figures.style import save

    for rung in dict.fromkeys(outcome.rung for outcome in found):
        figures = {"losses": final_losses(found, rung)}
        if along is not None and rung in set(along["rung"]):
            figures["gap"] = gap_curves(along, arms, arms[0], rung)
        if curves is not None and measured is not None and rung in set(measured["rung"]):
            figures["dynamics"] = along_the_run(curves, measured, arms, rung)
            figures["spectra"] = spectra(measured, arms, rung)
        for name, figure in figures.items():
            yield save(figure, folder, f"{name}-{rung}")
