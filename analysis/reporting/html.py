"""The report: one page that needs no other file and no network, and its figures as files for papers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.audit import audit
from analysis.data.tuning import TuningTables
from analysis.figures.registry import FigureInputs, SavedFigure, save_figures
from analysis.figures.style import arm_label
from analysis.ratio.study import Study, write_study
from analysis.reporting.sentences import explanation, fit_text, headline_text, left_out_text
from analysis.reporting.tables import arm_table, audit_table, cell_text, comparison_tables, latex, markdown, run_table
from analysis.single_arm.isoflop import Allocations, allocations
from scaling.errors import UserError
from scaling.io import write_atomic

if TYPE_CHECKING:
    import pandas as pd


def write_report(
    study: Study,
    frame: pd.DataFrame,
    folder: Path | str,
    *,
    curves: pd.DataFrame | None = None,
    search: TuningTables | None = None,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write report.html, fits.json and the figures; the same files, byte for byte, for the same values.

    Args:
        study: The study of the table (`analysis.ratio.study.fit_table`).
        frame: The checked table it was made from.
        folder: Gets report.html, fits.json, tables.md and tables.tex; figures/ under it gets each figure as SVG, PDF and PNG.
        curves: Logged steps, as ``curves.parquet`` has them.
        search: The search for settings behind the table.
        title: Heading of the page; the arms when not given.
        facts: Shown under the heading, such as date, commit and data, by name.

    Returns:
        The path of report.html.
    """
    import jinja2

    folder = Path(folder)
    inputs = FigureInputs(
        study=study,
        frame=frame,
        curves=curves,
        trials=frame if search is None else search.trials,
        tuning_budget=None if search is None else search.budget,
        allocations=_allocations(study, frame),
    )
    figures = [(figure, _svg_element(figure)) for figure in save_figures(inputs, folder / "figures")]
    write_study(study, folder / "fits.json")
    write_atomic(folder / "tables.md", markdown(study).encode())
    write_atomic(folder / "tables.tex", latex(study).encode())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell_text"] = cell_text
    page = environment.get_template("report.html.j2").render(
        title=title or f"{', '.join(map(arm_label, study.arms[1:]))} against {arm_label(study.baseline)}",
        facts={**(facts or {}), "Table": study.table},
        arms=arm_table(study, frame),
        figures=figures,
        comparisons=[(c, headline_text(c), explanation(study, c), comparison_tables(c)) for c in study.comparisons],
        audit=audit_table(audit(frame, study, None if search is None else search.trials)),
        laws=[fit_text(fit) for fit in study.fits.values()],
        notes=search.notes if search is not None else (),
        runs=run_table(study, frame),
        left_out=left_out_text(study),
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _allocations(study: Study, frame: pd.DataFrame) -> list[Allocations]:
    """Compute-optimal splits of the arms of a grid, those left out whose runs do not determine one."""
    found = []
    for arm in study.arms if study.design == "grid" else ():
        with contextlib.suppress(UserError):
            found.append(allocations(frame, arm))
    return found


def _svg_element(figure: SavedFigure) -> str:
    """The SVG element of a figure's file, its identifiers made unique to the page.

    The text inside was escaped by matplotlib, so the template inserts it as it is.
    """
    svg = figure.file.read_text()
    body = svg[svg.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        body = body.replace(mark, f"{mark}{figure.file.stem}-")
    return body
