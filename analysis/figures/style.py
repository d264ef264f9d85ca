"""Style shared by all figures: one look for each arm, plain numbers on log axes, reproducible files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from scaling.io import write_atomic
from scaling.units import FLOPS_PER_PFLOPS_DAY, human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "scaling",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # names of arms and rungs are plain text
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
"""Settings of matplotlib while one figure is made; no global state is changed."""

EXTRAPOLATION_DASHES = (4, 2.5)
"""Dashes of a law beyond its data, in points."""

MUTED = "#777777"

COLOURS = ("#0b4f8a", "#d9660a", "#2a9d76", "#b5408f", "#6aaed6", "#8a6d1f", "#444444", "#c9a227")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
Dash = Literal["-"] | tuple[float, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ("-", (0, (5, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)))

ARM_LABELS = {"adamw": "AdamW", "muon": "Muon", "normuon": "NorMuon"}
"""Published names of optimizers, for arms that are called after them. Other arms are shown by their own name."""


class Look(NamedTuple):
    """Colour, marker and dashes of an arm. Lightness varies along `COLOURS`, so that grey prints keep arms apart."""

    colour: str
    marker: str
    dash: Dash

    @property
    def line(self) -> dict[str, Any]:
        """Options of `Axes.plot` for a line."""
        return {"color": self.colour, "linestyle": self.dash}

    @property
    def points(self) -> dict[str, Any]:
        """Options of `Axes.plot` for points without a line."""
        return {"color": self.colour, "linestyle": "", "marker": self.marker}

    @property
    def marked_line(self) -> dict[str, Any]:
        """Options of `Axes.plot` for a line through its points."""
        return {**self.line, "marker": self.marker}


def look(arms: Sequence[str], arm: str) -> Look:
    """The look of an arm by its place among the study's arms, baseline first.

    There is one more marker than there are colours, so the pairs repeat only after 72 arms.
    """
    place = list(arms).index(arm)
    return Look(
        COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], DASHES[place // len(COLOURS) % len(DASHES)]
    )


def arm_label(arm: str) -> str:
    """An arm's name as readers see it.

    matplotlib leaves out legend entries that begin with an underscore, so such names get a space in front.
    """
    label = ARM_LABELS.get(arm, arm)
    return f" {label}" if label.startswith("_") else label


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Settings of matplotlib for the figures made inside, or by the function that this decorates."""
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, outside pyplot's global list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_grid(
    count: int,
    *,
    columns: int,
    size: tuple[float, float],
    handles: Sequence[Line2D],
    labels: tuple[str, str],
    **subplots: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure of panels with one legend, which takes the free place of the last row or the line above the panels.

    Args:
        count: Panels.
        columns: Panels side by side.
        size: Width and height of one panel, in inches.
        handles: Entries of the legend.
        labels: Of the x and y axes of all panels.
        subplots: Passed to `Figure.subplots`.
    """
    lines = -(-count // columns)
    spare = lines * columns > count
    figure = new_figure(size[0] * columns + 0.5, size[1] * lines + (0.3 if spare else 0.6))
    grid = list(figure.subplots(lines, columns, squeeze=False, **subplots).ravel())
    if spare:
        grid[count].legend(handles=handles, loc="center left")
    else:
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
    for axes in grid[count:]:
        axes.set_axis_off()
    figure.supxlabel(labels[0], fontsize=9)
    if labels[1]:
        figure.supylabel(labels[1], fontsize=9)
    return figure, grid[:count]


def arm_handles(arms: Sequence[str], shown: Sequence[str] | None = None) -> list[Line2D]:
    """Legend entries of the arms that are shown; all of them by default."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], **look(arms, arm).marked_line, markersize=4, linewidth=1.2, label=arm_label(arm))
        for arm in (arms if shown is None else shown)
    ]


def plain_log_axis(axes: Axes, which: str, *, span: float, small: bool = False) -> None:
    """Log scale with plain numbers at ticks: powers of ten where the span is wide, 1-2-5 where it is not.

    Args:
        axes: The axes.
        which: ``x`` or ``y``.
        span: Greatest over least value shown.
        small: Label fewer ticks.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    if span < 7.0:
        axis.set_major_locator(MaxNLocator(nbins=5 if small else 6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        subs = (1.0, 2.0, 5.0) if span < (100 if small else 300) else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
        axis.set_minor_locator(LogLocator(base=10, subs=tuple(range(2, 10)), numticks=30))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: Any) -> str:
    if value <= 0:
        return ""
    if 1e-3 <= value < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = str(int(exponent)).replace("-", "−")
    raised = power.translate(str.maketrans("0123456789−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa}×10{raised}"


def short_counts(value: float, _: Any) -> str:
    """A tick of an axis of tokens: ``1.5M``."""
    text = human(value)
    return re.sub(r"\.?0+(?=\D*$)", "", text) if "." in text else text


def compute_axis(largest: float) -> tuple[str, float]:
    """The axis label for compute, and how many of its unit make a PFLOP/s-day: FLOPs where runs are small.

    Args:
        largest: Greatest compute shown, PFLOP/s-days.
    """
    unit, factor = ("FLOPs", FLOPS_PER_PFLOPS_DAY) if largest < 1e-2 else ("PFLOP/s-days", 1.0)
    return f"training compute C ({unit})", factor


def as_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file's content: ``svg``, ``pdf`` or ``png``, the same bytes for the same values."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
    with styled():
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def slug(name: str) -> str:
    """A name as part of a file name: letters, digits, dots, underscores and hyphens, at most 60 bytes.

    A name that had to be changed for that ends in a hash of itself, so that two names never share a file.
    """
    kept = re.sub(r"[^\w.-]", "-", name.lower())
    if kept == name.lower() and len(kept.encode()) <= 60:
        return kept
    return f"{kept.encode()[:50].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write the figure as SVG, PDF and PNG; the path of the SVG file."""
    name = slug(name)
    for kind in ("svg", "pdf", "png"):
        write_atomic(folder / f"{name}.{kind}", as_bytes(figure, kind))
    return folder / f"{name}.svg"
