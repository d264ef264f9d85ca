"""What all figures share: one look for each arm, plain numbers on log axes, files that come out byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scaling.io import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "text.parse_math": False,  # names of arms and rungs are text, whatever they hold
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
"""Of matplotlib, for the time of one figure: no global state is changed."""

BEYOND = (4, 2.5)
"""Dashes of a law beyond its data, in points."""
OVER_LINES: dict[str, Any] = {"frameon": True, "framealpha": 0.9, "edgecolor": "none"}
"""Of a legend that may lie on lines, which would strike through its words."""

MUTED = "#777777"


class Look(NamedTuple):
    """How an arm is drawn. Lightness falls along the list, so that grey prints keep arms apart."""

    colour: str
    marker: str


LOOKS = (
    Look("#0b4f8a", "o"),
    Look("#d9660a", "s"),
    Look("#2a9d76", "^"),
    Look("#b5408f", "D"),
    Look("#6aaed6", "v"),
    Look("#8a6d1f", "P"),
    Look("#444444", "X"),
    Look("#c9a227", "<"),
)
"""In the order of a study's arms: baseline first."""


def look(arms: Sequence[str], arm: str) -> Look:
    """The look of an arm by its place among the study's arms."""
    return LOOKS[list(arms).index(arm) % len(LOOKS)]


def legend_name(name: str) -> str:
    """A name for a legend: matplotlib leaves entries out that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Settings of matplotlib for the figures made inside."""
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that no window and no global list knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
    from scaling.units import human

    return re.sub(r"\.0+(?=\D|$)", "", human(value)) if value else "0"


def compute_label(largest: float) -> tuple[str, float]:
    """The axis label for compute and the factor from PFLOP/s-days: FLOPs where runs are small."""
    from scaling.units import FLOPS_PER_PFLOPS_DAY

    if largest < 1e-2:
        return "training compute (FLOPs)", FLOPS_PER_PFLOPS_DAY
    return "training compute (PFLOP/s-days)", 1.0


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
