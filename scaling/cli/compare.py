"""The verb about arms at one budget: which loss each ends with, and how the difference went along the runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.cli.common import print_json
from scaling.cli.tables import OnTable

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from analysis.same_budget import Outcome


@dataclass(frozen=True)
class Compare(OnTable):
    """Compare the arms at each budget: held-out losses, paired differences over seeds, figures of both."""

    json: bool = False
    """Print everything with full precision."""

    def run(self) -> None:
        """Print the table; write the figures where the results of this table are."""
        from rich.console import Console

        from analysis.same_budget import gaps, outcomes
        from analysis.study import choose_arms

        frame = self.read()
        arms = choose_arms(frame, frame.attrs["name"], self.baseline, self.challenger)
        found = outcomes(frame, arms)
        if self.json:
            print_json(found)
            return
        file = self.results() / "curves.parquet"
        along = gaps(_read(file), baseline=arms[0]) if file.exists() else None
        Console().print(_table(found, arms[0]))
        for line in [] if along is None else _crossings(along, arms, found):
            print(line)
        for path in _draw(self.results() / "figures", found, arms, along):
            print(f"Figure: {path}")


def _read(file: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(file)


def _table(found: Sequence[Outcome], baseline: str) -> Table:
    from rich.table import Table

    from scaling.units import human

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("rung", "arm"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "seeds", "loss", "sd", f"minus {baseline}", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in found:
        interval = "" if outcome.low is None else f"{outcome.low:+.4f} to {outcome.high:+.4f}"
        table.add_row(
            outcome.rung,
            outcome.arm,
            human(outcome.tokens),
            str(outcome.seeds),
            f"{outcome.loss:.4f}",
            "" if outcome.spread is None else f"{outcome.spread:.4f}",
            "" if outcome.difference is None else f"{outcome.difference:+.4f}",
            interval,
        )
    return table


def _crossings(along: pd.DataFrame, arms: Sequence[str], found: Sequence[Outcome]) -> Iterable[str]:
    """A line for each two arms of which one overtakes the other along the way, in the mean over seeds."""
    from itertools import permutations

    from analysis.same_budget import last_crossing
    from scaling.units import human

    for rung in dict.fromkeys(outcome.rung for outcome in found):
        starts = float(along.loc[along["rung"] == rung, "tokens"].min())
        for first, second in permutations(arms, 2):
            tokens = last_crossing(along, first, second, rung=rung)
            if tokens is not None and tokens > starts:
                yield f"At {rung}, {second} overtakes {first} after {human(tokens)} tokens and stays below."


def _draw(folder: Path, found: Sequence[Outcome], arms: Sequence[str], along: pd.DataFrame | None) -> Iterable[Path]:
    from analysis.figures.same_budget import final_losses, gap_curves
    from analysis.figures.style import save

    for rung in dict.fromkeys(outcome.rung for outcome in found):
        save(final_losses(found, rung), folder, f"losses-{rung}")
        yield folder / f"losses-{rung}.svg"
        if along is not None and len(along):
            save(gap_curves(along, arms, arms[0], rung), folder, f"gap-{rung}")
            yield folder / f"gap-{rung}.svg"
