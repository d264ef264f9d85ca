"""The numbers of a study as tables for papers: Markdown and LaTeX with the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.fitting.laws import Law
from analysis.ratio.formatting import compute_unit, interval_text, ratio_text
from analysis.ratio.study import Study
from analysis.reporting.terminal import point_cells, point_header

TEX = str.maketrans(
    {mark: f"\\{mark}" for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
"""Characters that mean something to TeX, and how each is printed."""

MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*[]|$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})
"""Characters that mean something to GitHub's Markdown or to HTML inside it. An underscore inside a word means nothing."""


class Formula(str):
    """A cell that is already mathematics between dollars, which both formats understand."""


Table = tuple[str, list[str], list[list[str]]]
"""Caption, header, rows."""


def tables(study: Study) -> list[Table]:
    """Laws, ratios and the spread over families."""
    made: list[Table] = [
        (
            "Laws; C in PFLOP/s-days, N and D counts, loss in nats per token. Error: root mean square of log residuals.",
            ["arm", "law", "runs", "error (%)", "status"],
            [
                [fit.arm, _law(fit.law), str(fit.points), f"{100 * fit.rms:.2f}", fit.status.replace("_", " ")]
                for fit in study.fits.values()
            ],
        )
    ]
    for comparison in study.comparisons:
        points = sorted([*comparison.rungs, comparison.headline], key=lambda point: -point.loss)
        pair = f"{comparison.challenger} against {comparison.baseline}"
        made.append(
            (
                f"FLOPs to match, {pair}. {comparison.interval}. C in {compute_unit(comparison)[0]}.",
                point_header(comparison),
                [point_cells(comparison, point) for point in points],
            )
        )
        made.append(
            (
                f"The same runs under other laws, {pair}, at loss {comparison.headline.loss:.4f}.",
                ["family", "parameters", "error (%)", "error at rungs left out (%)", "ratio", "95 % interval"],
                [
                    [
                        model.family,
                        str(model.parameters),
                        f"{100 * model.rms:.2f}",
                        "" if model.left_out_error is None else f"{100 * model.left_out_error:.2f}",
                        "" if model.ratio is None else ratio_text(model.ratio),
                        "" if model.ratio is None else interval_text(model.low, model.high),
                    ]
                    for model in comparison.models
                ],
            )
        )
        named = [[d.name, f"{d.ratio:.4f}", f"{d.loss:.4f}", d.support] for d in comparison.definitions]
        named += [[c.label, f"{c.ratio:.4f}", f"{comparison.headline.loss:.4f}", ""] for c in comparison.conventions]
        made.append((f"Other readings, {pair}.", ["reading", "ratio", "loss", "support"], named))
    return made


def _law(law: Law) -> Formula:
    return Formula(f"${law.math()}$")


def markdown(study: Study) -> str:
    """All tables as GitHub's Markdown."""
    return "\n".join(markdown_table(table) for table in tables(study))


def markdown_table(table: Table) -> str:
    """One table as GitHub's Markdown, its caption above it."""
    caption, head, rows = table
    lines = [_bar(head), _bar(["---"] * len(head)), *(_bar(row) for row in rows)]
    return f"{markdown_text(caption)}\n\n" + "\n".join(lines) + "\n"


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """Text as GitHub's Markdown shows it, whatever it holds."""
    return text if isinstance(text, Formula) else text.translate(MARKDOWN)


def latex(study: Study) -> str:
    """All tables as LaTeX; the preamble needs the package booktabs."""
    blocks = []
    for caption, head, rows in tables(study):
        body = " \\\\\n".join(" & ".join(_tex(cell) for cell in row) for row in rows)
        blocks.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{_tex(caption)}}}\n"
            f"\\begin{{tabular}}{{{'l' + 'r' * (len(head) - 1)}}}\n\\toprule\n"
            f"{' & '.join(_tex(name) for name in head)} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n"
            "\\end{tabular}\n\\end{table}"
        )
    return "\n\n".join(blocks) + "\n"


def _tex(cell: str) -> str:
    return cell if isinstance(cell, Formula) else cell.translate(TEX)
