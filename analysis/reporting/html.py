"""The report: one page that needs nothing beside it, and its figures as files for papers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.audit import audit
from analysis.data.tuning import TuningTables
from analysis.figures.registry import pictures
from analysis.figures.style import save
from analysis.ratio.compare import Comparison
from analysis.ratio.formatting import compute_unit, interval_text, ratio_text
from analysis.ratio.study import Study, write_study
from analysis.reporting.tables import latex, markdown
from analysis.reporting.terminal import explanation, fit_text, headline_text, left_out_text, point_cells, point_header
from scaling.io import write_atomic
from scaling.units import human

if TYPE_CHECKING:
    import pandas as pd


STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1c1c1c;max-width:60rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.12rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
.lead{font-size:1.12rem;font-weight:600;margin:.8rem 0}.note{color:#555}
figure{margin:1.2rem 0;text-align:center}figure svg{max-width:100%;height:auto}figcaption{color:#555;font-size:.88rem;text-align:left}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.22rem .65rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{border-bottom:1px solid #999;font-weight:600}td.l,th.l{text-align:left}td.w{white-space:normal;text-align:left;min-width:11rem;vertical-align:top}figcaption{white-space:pre-line}
tr.muted td{color:#888}pre{background:#f6f6f6;padding:.7rem 1rem;overflow-x:auto;font-size:.85rem}
.pass{color:#1b7a3d;font-weight:600}.warn{color:#a15c00;font-weight:600}.fail{color:#b3261e;font-weight:600}
@media print{body{max-width:none;margin:0}figure,table{break-inside:avoid}}
"""

MOST_ROWS = 200
"""Runs listed in the page; the table itself holds the rest."""


def write_report(
    study: Study,
    frame: pd.DataFrame,
    folder: Path | str,
    *,
    curves: pd.DataFrame | None = None,
    search: TuningTables | None = None,
    title: str | None = None,
) -> Path:
    """Write report.html, fits.json and the figures; the same files, byte for byte, for the same values.

    Args:
        study: What `analysis.ratio.study.fit_table` gave.
        frame: The checked table it was made from.
        folder: Gets report.html, fits.json, tables.md and tables.tex; figures/ under it gets each figure as SVG, PDF and PNG.
        curves: Logged steps (columns arm, rung, run, step, tokens, flops, train_loss, validation_loss), if there are.
        search: What is known of the search for settings, if there was one.
        title: Heading of the page.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    figures = pictures(study, frame, curves, search)
    captions = {save(figure, folder / "figures", name): caption for name, (figure, caption) in figures.items()}
    write_study(study, folder / "fits.json")
    write_atomic(folder / "tables.md", markdown(study).encode())
    write_atomic(folder / "tables.tex", latex(study).encode())
    title = title or f"{', '.join(study.arms[1:])} against {study.baseline}"
    page = "\n".join(_page(study, frame, search, captions, title))
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _page(
    study: Study,
    frame: pd.DataFrame,
    search: TuningTables | None,
    captions: dict[Path, str],
    title: str,
) -> Iterable[str]:
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    yield f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
    yield f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(study.table)}</p>"
    for comparison in study.comparisons:
        yield f"<p class=lead>{html.escape(headline_text(comparison))}</p>"
        yield from (f"<p>{html.escape(line)}</p>" for line in explanation(study, comparison))
    yield from _audit(study, frame, search)
    yield "<h2>Figures</h2>"
    for file, caption in captions.items():
        svg = _inline(file.read_text(), file.stem)
        yield f'<figure id="{file.stem}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'
    for comparison in study.comparisons:
        yield from _comparison(study, comparison)
    yield "<h2>Laws</h2>"
    yield f"<pre>{html.escape(chr(10).join(fit_text(fit) for fit in study.fits.values()))}</pre>"
    if search is not None and search.notes:
        yield "<h2>The search for settings</h2><ul>"
        yield from (f"<li>{html.escape(note)}</li>" for note in search.notes)
        yield "</ul>"
    yield from _runs(study, frame)
    yield "</body></html>"


def _audit(study: Study, frame: pd.DataFrame, search: TuningTables | None) -> Iterable[str]:
    checks = audit(frame, study, None if search is None else search.trials)
    rows = [
        f"<tr><td class=l><span class={check.verdict}>{check.verdict}</span></td><td class=w>{html.escape(check.question)}"
        f"</td><td class=w>{html.escape(check.evidence)}</td><td class=w>{html.escape(check.remedy)}</td></tr>"
        for check in checks
    ]
    yield "<h2>Is the comparison fair?</h2>"
    yield '<div class="scroll"><table><thead><tr><th class="l"></th><th class="l">question</th>'
    yield '<th class="l">evidence</th><th class="l">remedy</th></tr></thead><tbody>'
    yield "".join(rows) + "</tbody></table></div>"


def _inline(svg: str, name: str) -> str:
    """The SVG element alone, its identifiers made unique to the page."""
    body = svg[svg.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        body = body.replace(mark, f"{mark}{name}-")
    return body


def _comparison(study: Study, comparison: Comparison) -> Iterable[str]:
    heading = f"{comparison.challenger} against {comparison.baseline}"
    yield f"<h2>{html.escape(heading)}</h2><h3>FLOPs to match</h3>"
    points = sorted([*comparison.rungs, comparison.headline], key=lambda point: -point.loss)
    yield _table(
        point_header(comparison),
        [point_cells(comparison, point) for point in points],
        left=(4, 5),
        muted=[point.support != "interpolated" for point in points],
    )
    yield f"<p class=note>C in {compute_unit(comparison)[0]}; a PFLOP/s-day is 8.64e19 FLOPs. Muted rows rest on a law beyond its runs.</p>"
    yield "<h3>The same runs under other laws, at the headline's loss</h3>"
    yield _table(
        ("family", "law", "parameters", "error", "error at rungs left out", "ratio", "95 % interval"),
        [
            (
                model.family,
                model.label,
                str(model.parameters),
                f"{model.rms:.2%}",
                "" if model.left_out_error is None else f"{model.left_out_error:.2%}",
                model.remark if model.ratio is None else ratio_text(model.ratio),
                "" if model.ratio is None else interval_text(model.low, model.high),
            )
            for model in comparison.models
        ],
        left=(0, 1, 6),
        muted=[model.family != comparison.family for model in comparison.models],
    )
    yield "<h3>Ratios with a name</h3>"
    yield _table(
        ("definition", "ratio", "95 % interval", "loss", "support", "what it is"),
        [
            (
                found.name,
                f"{found.ratio:.5f}",
                interval_text(found.low, found.high) if found.low is not None else "",
                f"{found.loss:.4f}",
                found.support,
                found.text + (f"; {found.interval}" if found.interval else ""),
            )
            for found in comparison.definitions
        ],
        left=(0, 2, 4),
        wide=(5,),
    )
    yield "<h3>The headline's interval by other methods, and without each rung</h3>"
    yield _table(
        ("method", "95 % interval", "remark"),
        [(item.method, interval_text(item.low, item.high), item.remark) for item in comparison.intervals],
        left=(0, 1),
        wide=(2,),
    )
    unit, size = compute_unit(comparison)
    if comparison.jackknife:
        yield _table(
            (f"without the rung at ({unit})", "ratio"),
            [
                (f"{item.compute * size:.4g}", "never reached" if item.ratio is None else ratio_text(item.ratio))
                for item in comparison.jackknife
            ],
        )
    if comparison.conventions:
        yield "<h3>The ratio in other prices</h3>"
        yield _table(
            ("price", "ratio", "95 % interval", "how"),
            [
                (
                    found.label,
                    ratio_text(found.ratio),
                    interval_text(found.low, found.high) if found.low is not None else "",
                    found.how,
                )
                for found in comparison.conventions
            ],
            left=(0, 2),
            wide=(3,),
        )
    for found in comparison.factors:
        yield (
            f"<p>One token of {html.escape(found.arm)} is worth {found.tokens.value:.3g} "
            f"({found.tokens.low:.3g} to {found.tokens.high:.3g}) of {html.escape(comparison.baseline)}'s, one parameter "
            f"{found.params.value:.3g} ({found.params.low:.3g} to {found.params.high:.3g}); 95 % intervals.</p>"
        )


def _runs(study: Study, frame: pd.DataFrame) -> Iterable[str]:
    rows = frame[frame["arm"].isin(study.arms)]
    reasons = {out.row: out.reason for out in study.left_out}
    extra = [name for name in ("rung", "cell", "seed", "status", "peak_lr", "seconds") if name in frame]
    yield f"<h2>Runs</h2><p class=note>{len(rows)} rows.</p>"
    if len(rows) > MOST_ROWS:
        yield f"<p class=note>The first {MOST_ROWS} are listed; the table holds the rest.</p>"
    shown = rows.head(MOST_ROWS)
    body = []
    for index, row in shown.iterrows():
        number = int(str(index)) + 1
        body.append(
            (
                str(number),
                str(row["arm"]),
                *(_short(row[name]) for name in extra),
                _count(row["params"]),
                _count(row["tokens"]),
                "" if row["flops"] != row["flops"] else f"{row['flops']:.4g}",
                "" if row["loss"] != row["loss"] else f"{row['loss']:.4f}",
                reasons.get(number, ""),
            )
        )
    yield _table(
        ("row", "arm", *extra, "N", "D", "FLOPs", "loss", "left out because"),
        body,
        left=(1, len(extra) + 6),
        muted=[bool(line[-1]) for line in body],
    )
    text = left_out_text(study)
    yield f"<pre>{html.escape(chr(10).join(text))}</pre>" if text else "<p>No run was left out.</p>"


def _count(value: Any) -> str:
    return "" if value != value else human(float(value))


def _short(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (),
    wide: Sequence[int] = (),
    muted: Sequence[bool] = (),
) -> str:
    def kind(column: int) -> str:
        return ' class="w"' if column in wide else ' class="l"' if column in left else ""

    top = "".join(f"<th{kind(i).replace('w', 'l')}>{html.escape(name)}</th>" for i, name in enumerate(head))
    lines = []
    for number, row in enumerate(rows):
        shade = ' class="muted"' if number < len(muted) and muted[number] else ""
        cells = "".join(f"<td{kind(i)}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr{shade}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
