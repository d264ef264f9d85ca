"""One training run: specification, data, models, optimizers, training, evaluation and export.

The public API of one run; the modules behind it are imported when a name is first used, so ``import scaling`` is cheap::

    from pathlib import Path
    from scaling import DataConfig, Placement, RunDirectory, prepare, train

    data = Path("data/texts")
    prepare(DataConfig(source="text", path="texts"), data)         # token shards, written once
    directory = RunDirectory(Path("runs") / spec.id)               # spec: a RunSpec
    directory.create(spec, Placement(data=str(data)))
    record = train(directory.path)                                 # RunRecord; None if it was stopped

* Specification: `RunSpec` and its parts `ModelConfig`, `Budget`, `OptimizerSpec`, `Schedule`, `DataSpec`, `Evaluation`,
  `WarmStart`; `Placement` is where and how a run executes.
* Data: `DataConfig`, `prepare`, `manifest_hash`.
* Runs: `RunDirectory`, `RunRecord`, `train`, `evaluate`, `export_hf`.
* Registries, which installed packages extend through entry points: `OPTIMIZERS`, `SOURCES` (`scaling.registry`).
* Errors: `UserError`, the base of all errors that a user can act on.

`sweeps` plans and executes many runs; `analysis` reads their results. Neither is imported here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.data.prepare import prepare
    from scaling.data.shards import manifest_hash
    from scaling.data.sources.registry import SOURCES, DataConfig
    from scaling.errors import UserError
    from scaling.evaluation.loss import evaluate
    from scaling.export.huggingface import export_hf
    from scaling.optim.registry import OPTIMIZERS
    from scaling.run.directory import RunDirectory
    from scaling.run.record import RunRecord
    from scaling.spec import (
        Budget,
        DataSpec,
        Evaluation,
        ModelConfig,
        OptimizerSpec,
        Placement,
        RunSpec,
        Schedule,
        WarmStart,
    )
    from scaling.training.loop import train

__all__ = [
    "OPTIMIZERS",
    "SOURCES",
    "Budget",
    "DataConfig",
    "DataSpec",
    "Evaluation",
    "ModelConfig",
    "OptimizerSpec",
    "Placement",
    "RunDirectory",
    "RunRecord",
    "RunSpec",
    "Schedule",
    "UserError",
    "WarmStart",
    "evaluate",
    "export_hf",
    "manifest_hash",
    "prepare",
    "train",
]

_MODULES = {
    "scaling.data.prepare": ("prepare",),
    "scaling.data.shards": ("manifest_hash",),
    "scaling.data.sources.registry": ("SOURCES", "DataConfig"),
    "scaling.errors": ("UserError",),
    "scaling.evaluation.loss": ("evaluate",),
    "scaling.export.huggingface": ("export_hf",),
    "scaling.optim.registry": ("OPTIMIZERS",),
    "scaling.run.directory": ("RunDirectory",),
    "scaling.run.record": ("RunRecord",),
    "scaling.training.loop": ("train",),
}
"""Names by the module that defines them; the others are in `scaling.spec`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'scaling' has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "scaling.spec")
    return getattr(importlib.import_module(module), name)
