"""Analysis of tables of runs: laws, fits, intervals, the match ratio. Imports no torch.

The names in `__all__` are the public interface; each module is loaded when one of its names is first used::

    from analysis import fit_table, read_table

    study = fit_table(read_table("runs.csv"))
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "analysis.data.table": ("RunsTable", "TableError", "check_table", "read_table"),
    "analysis.fitting.families": ("LAW_FAMILIES", "LawFamily"),
    "analysis.fitting.fit": ("Fit", "fit_law"),
    "analysis.fitting.laws": ("LAWS", "LawForm", "LossSurface", "PowerLaw", "TermSum"),
    "analysis.fitting.objective": ("HUBER", "LEAST_SQUARES", "Objective"),
    "analysis.fitting.parameterization": ("Sharing",),
    "analysis.ratio.moonlight": ("moonlight_table",),
    "analysis.power.forecast": ("forecast",),
    "analysis.ratio.study": ("Study", "fit_table", "load_or_fit", "read_study", "write_study"),
    "analysis.single_arm.fit_arm": ("fit_arm",),
    "analysis.single_arm.holdout": ("hold_out",),
    "analysis.single_arm.isoflop": ("allocations",),
    "analysis.audit": ("audit",),
    "analysis.reporting.html": ("write_report",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import the module of a public name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """Public names, for completion in notebooks."""
    return [*globals(), *__all__]
