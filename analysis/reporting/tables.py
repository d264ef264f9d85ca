"""The numbers of a study as tables: built once, rendered for the terminal, the page, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.audit import AuditCheck
from analysis.data.cells import rungs
from analysis.figures.style import arm_label
from analysis.ratio.compare import Comparison
from analysis.ratio.cost_metrics import TIMES
from analysis.ratio.formatting import compute_unit, interval_text, law_text, ratio_text
from analysis.ratio.study import Study
from scaling.units import human

if TYPE_CHECKING:
    import pandas as pd

MAX_RUNS_LISTED = 200
"""Runs in the page's table; runs.csv holds the rest."""

RUN_COLUMNS = ("rung", "cell", "seed", "status", "peak_lr", "seconds")
"""Columns of the runs table that are shown where a table has them."""

MARKDOWN_ESCAPES = str.maketrans({mark: f"\\{mark}" for mark in "\\`*[]|$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})
"""Characters that GitHub's Markdown, or HTML inside it, interprets. An underscore inside a word is not among them."""


class Formula(NamedTuple):
    """A cell with a law: as plain text, and as mathematics between dollars for Markdown and LaTeX."""

    text: str
    math: str


Cell = str | Formula


class Table(NamedTuple):
    """A table before it is rendered."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: Sequence[int] = (0,)
    """Columns that are aligned to the left."""
    prose: Sequence[int] = ()
    """Columns of sentences, which are wrapped in the page and left out of Markdown and LaTeX."""
    muted: Sequence[bool] = ()
    """Rows that are shown faintly."""


def arm_table(study: Study, frame: pd.DataFrame) -> Table:
    """One row an arm: loss at its largest rung, the ratio with its interval, other laws, and time.

    Args:
        study: The study.
        frame: The checked table that it was made from.
    """
    comparisons = {comparison.challenger: comparison for comparison in study.comparisons}
    rows = []
    for arm in study.arms:
        fit = study.fits[arm]
        used = frame.loc[[row - 1 for row in fit.rows]]
        rung = rungs(used["flops"].to_numpy(dtype=np.float64))
        largest = used[rung == rung.max()]
        flops, loss = f"{largest['flops'].mean():.3g}", f"{largest['loss'].mean():.4f}"
        answer = _answer(comparisons[arm]) if arm in comparisons else ["1 (baseline)", "", "", ""]
        rows.append([arm_label(arm), loss, *answer, flops, str(fit.points)])
    head = ["arm", "loss at largest rung", "FLOPs ratio", "95 % interval", "other laws", "time ratio"]
    head += ["largest rung (FLOPs)", "runs"]
    return Table(
        "Loss: mean nats per token. FLOPs ratio: FLOPs to reach the baseline's loss, relative to the baseline; "
        "time ratio: the same in measured time. Other laws: range of the ratio under other laws through the same runs, which "
        "the interval does not include.",
        head,
        rows,
    )


def _answer(comparison: Comparison) -> list[str]:
    head = comparison.headline
    others = [model.ratio for model in comparison.models if model.ratio is not None]
    times = [price.ratio for price in comparison.conventions if price.column in TIMES]
    return [
        ratio_text(head.ratio) + ("" if head.support == "interpolated" else f" ({head.support})"),
        interval_text(head.low, head.high),
        interval_text(min(others), max(others)) if len(others) > 1 else "",
        ratio_text(times[0]) if times else "",
    ]


def law_table(study: Study) -> Table:
    """The law of each arm alone."""
    return Table(
        "Laws; C in PFLOP/s-days, N and D counts, loss in nats per token. Error: root mean square of log residuals.",
        ["arm", "law", "runs", "error (%)", "status"],
        [
            [
                fit.arm,
                Formula(law_text(fit.law), f"${fit.law.math()}$"),
                str(fit.points),
                f"{100 * fit.rms:.2f}",
                fit.status.replace("_", " "),
            ]
            for fit in study.fits.values()
        ],
        left=(0, 1, 4),
    )


def match_table(comparison: Comparison) -> Table:
    """FLOPs to match at each rung and at the headline, in order of falling loss."""
    points = sorted([*comparison.rungs, comparison.headline], key=lambda point: -point.loss)
    unit, size = compute_unit(comparison)
    return Table(
        f"FLOPs to match, {_pair(comparison)}. {comparison.interval}. C in {unit}.",
        ["loss", f"C {comparison.baseline}", f"C {comparison.challenger}", "ratio", "95 % interval", "support"],
        [
            [
                f"{point.loss:.4f}",
                f"{point.baseline_compute * size:.4g}",
                f"{point.challenger_compute * size:.4g}",
                ratio_text(point.ratio),
                interval_text(point.low, point.high),
                point.support,
            ]
            for point in points
        ],
        left=(4, 5),
        muted=[point.support != "interpolated" for point in points],
    )


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Ratios of one challenger: at each rung, under other laws, by other definitions, intervals and rungs."""
    head, pair = comparison.headline, _pair(comparison)
    unit, size = compute_unit(comparison)
    found = [
        match_table(comparison),
        Table(
            f"The same runs under other laws, {pair}, at loss {head.loss:.4f}.",
            ["family", "parameters", "error (%)", "error at rungs left out (%)", "ratio", "95 % interval", "law"],
            [
                [
                    model.family,
                    str(model.parameters),
                    f"{100 * model.rms:.2f}",
                    "" if model.left_out_error is None else f"{100 * model.left_out_error:.2f}",
                    "" if model.ratio is None else ratio_text(model.ratio),
                    "" if model.ratio is None else interval_text(model.low, model.high),
                    model.label + (f"; {model.remark}" if model.ratio is None else ""),
                ]
                for model in comparison.models
            ],
            left=(0, 5, 6),
            prose=(6,),
            muted=[model.family != comparison.family for model in comparison.models],
        ),
        Table(
            f"Other readings, {pair}.",
            ["reading", "ratio", "loss", "support", "95 % interval", "method"],
            [
                [
                    d.name,
                    f"{d.ratio:.4f}",
                    f"{d.loss:.4f}",
                    d.support,
                    _interval(d.low, d.high),
                    f"{d.text}; {d.interval}" if d.interval else d.text,
                ]
                for d in comparison.definitions
            ]
            + [
                [c.label, f"{c.ratio:.4f}", f"{head.loss:.4f}", "", _interval(c.low, c.high), c.how]
                for c in comparison.conventions
            ],
            left=(0, 3, 4),
            prose=(5,),
        ),
        Table(
            f"The headline's interval by other methods, {pair}.",
            ["method", "95 % interval", "remark"],
            [[item.method, interval_text(item.low, item.high), item.remark] for item in comparison.intervals],
            left=(0, 1),
            prose=(2,),
        ),
        Table(
            f"The ratio without one rung, {pair}.",
            [f"rung left out ({unit})", "ratio"],
            [
                [f"{item.compute * size:.4g}", "never reached" if item.ratio is None else ratio_text(item.ratio)]
                for item in comparison.jackknife
            ],
            left=(),
        ),
    ]
    return [table for table in found if table.rows]


def audit_table(checks: Sequence[AuditCheck]) -> Table:
    """Checks with their evidence."""
    return Table(
        "",
        ["verdict", "question", "evidence", "remedy"],
        [[check.verdict, check.question, check.evidence, check.remedy] for check in checks],
        prose=(1, 2, 3),
    )


def run_table(study: Study, frame: pd.DataFrame) -> Table:
    """The first runs of the study's arms; those left out of the fits are muted and give the reason."""
    rows = frame[frame["arm"].isin(study.arms)]
    reasons = {out.row: out.reason for out in study.left_out}
    extra = [name for name in RUN_COLUMNS if name in frame]
    cells = []
    for index, row in rows.head(MAX_RUNS_LISTED).iterrows():
        number = int(str(index)) + 1
        counts = ["" if row[name] != row[name] else human(float(row[name])) for name in ("params", "tokens")]
        loss = "" if row["loss"] != row["loss"] else f"{row['loss']:.4f}"
        named = [_short(row[name]) for name in extra]
        cells.append([str(number), row["arm"], *named, *counts, _short(row["flops"]), loss, reasons.get(number, "")])
    listed = f", of which the first {MAX_RUNS_LISTED} are listed" if len(rows) > MAX_RUNS_LISTED else ""
    return Table(
        f"{len(rows):,} rows{listed}. N: parameters, D: tokens. Muted rows were left out of the fits.",
        ["row", "arm", *(name.replace("_", " ") for name in extra), "N", "D", "FLOPs", "loss", "left out because"],
        cells,
        left=(1,),
        prose=(len(extra) + 6,),
        muted=[bool(line[-1]) for line in cells],
    )


def _pair(comparison: Comparison) -> str:
    return f"{comparison.challenger} against {comparison.baseline}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else interval_text(low, high)


def _short(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell_text(cell: Cell) -> str:
    """A cell as plain text."""
    return cell if isinstance(cell, str) else cell.text


def study_tables(study: Study) -> list[Table]:
    """Tables for papers: laws, ratios and the spread over families, without columns of sentences."""
    tables = []
    for table in (law_table(study), *(table for c in study.comparisons for table in comparison_tables(c))):
        kept = [number for number in range(len(table.head)) if number not in table.prose]
        head = [table.head[number] for number in kept]
        rows = [[row[number] for number in kept] for row in table.rows]
        left = [place for place, number in enumerate(kept) if number in table.left]
        tables.append(table._replace(head=head, rows=rows, left=left, prose=()))
    return tables


def markdown(study: Study) -> str:
    """All tables as GitHub's Markdown."""
    return "\n".join(markdown_table(table) for table in study_tables(study))


def markdown_table(table: Table) -> str:
    """One table as GitHub's Markdown, its caption above it."""
    lines = [_bar(table.head), _bar(["---"] * len(table.head)), *(_bar(row) for row in table.rows)]
    return f"{markdown_text(table.caption)}\n\n" + "\n".join(lines) + "\n"


def _bar(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def markdown_text(cell: Cell) -> str:
    """A cell or a sentence as GitHub's Markdown shows it literally."""
    return cell.translate(MARKDOWN_ESCAPES) if isinstance(cell, str) else cell.math


def latex(study: Study) -> str:
    """All tables as LaTeX; the preamble needs the package booktabs."""
    return "\n".join(latex_table(table) for table in study_tables(study))


def latex_table(table: Table) -> str:
    """One table as LaTeX, its caption above it."""
    import pandas as pd

    style = pd.DataFrame([list(row) for row in table.rows], columns=pd.Index(list(table.head))).style
    style = style.hide(axis="index").format_index(escape="latex", axis="columns").format(escape="latex")
    for number, name in enumerate(table.head):
        if isinstance(table.rows[0][number], Formula):
            style = style.format(attrgetter("math"), subset=[name])
    return style.to_latex(
        hrules=True,
        caption=latex_text(table.caption),
        position_float="centering",
        column_format="".join("l" if number in table.left else "r" for number in range(len(table.head))),
    )


def latex_text(text: str) -> str:
    """A sentence as LaTeX prints it literally.

    The Styler escapes cells and leaves captions as they are, so a caption passes through a table of one cell.
    """
    import pandas as pd

    cell = pd.DataFrame([text]).style.hide(axis="index").hide(axis="columns")
    return str(cell.format(escape="latex").to_string()).strip()
