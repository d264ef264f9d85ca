"""Tables of a campaign's runs: runs.csv (one row per run), curves.parquet (per logged step) and dynamics.parquet.

dynamics.parquet has one row for every number that a run measured of its updates and parameters, if the campaign asks for
them. campaign.json in the same folder names the campaign.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scaling.errors import UserError
from scaling.flops import CONVENTIONS, train_flops
from scaling.io import read_json, write_atomic, write_json
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.run.record import RunRecord
from scaling.training.warm_start import charged_parents
from sweeps.config.campaign import COLLECTED_FILE, Collected
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.planning.run_state import status_and_record
from sweeps.planning.tuned_settings import refuse_untuned

if TYPE_CHECKING:
    import pandas as pd


T = TypeVar("T")

RUN_COLUMNS = (
    "campaign", "arm", "rung", "cell", "seed", "run", "status", "params", "tokens", "flops", "flops_matmul",
    "flops_attention", "flops_attention_full", "flops_with_optimizer", "flops_attention_with_optimizer", "loss", "train_loss", "seconds", "cpu_seconds",
    "tokens_per_second", "peak_lr", "batch_tokens", "manifest", "code", "reason",
)  # fmt: skip
"""Columns of runs.csv. `params` are the parameters of the blocks. `flops` is 6ND; the other counts name their convention,
and include the optimizer's matrix products if they say so (`scaling.optim.optimizer_flops`). `loss` is the held-out loss at
the last token in nats per token. `seconds` is training time and `cpu_seconds` the processor time of runs on a CPU. FLOPs
and times include those of the runs that a run started from and is charged for. `code` is a hash of the source that trained
the run (`scaling.run.record.Code.digest`)."""

RUN_IDENTITY = ("campaign", "arm", "rung", "cell", "seed", "run")
COUNTED = ("step", "tokens", "flops")
MEASURED = ("train_loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")
CURVE_COLUMNS = (*RUN_IDENTITY, *COUNTED, *MEASURED)
"""Columns of curves.parquet; those after `RUN_IDENTITY` are fields of `scaling.run.record.MetricsRow`."""

DYNAMICS_COLUMNS = (*RUN_IDENTITY, "step", "tokens", "quantity", "part", "value")
"""Columns of dynamics.parquet: `quantity` is a field of `scaling.run.record.DynamicsRow`, `part` the measured part."""


def _refuse_loss(folder: Path, plan: CampaignPlan) -> None:
    """Refuse to replace tables of another campaign whose finished runs the new tables would lack.

    Tables belong to the campaign whose content (`campaign_identity`) was collected. A campaign that grew by rungs, arms
    or seeds has every finished run of the old table and may replace it.
    """
    import pandas as pd

    table, file = folder / "runs.csv", folder / COLLECTED_FILE
    if not table.exists():
        return
    source = read_json(file, Collected) if file.exists() else None
    if source is not None and source.identity == plan.campaign.identity:
        return
    old = pd.read_csv(table, dtype={"run": str})
    if not {"run", "status"} <= set(old.columns):
        return
    done = set(old.loc[old["status"].isin(["finished", "diverged"]), "run"])
    lost = done - {run.id for run in plan.runs}
    if lost:
        raise UserError(
            f"{table}: has {len(done)} finished runs{f', collected from {source.file}' if source else ''}, and "
            f"{len(lost)} of them are not runs of {plan.campaign.file} as it is now. Give this campaign another name "
            f"(--set name={plan.campaign.name}-2, for every verb), or collect with --overwrite; runs/ keeps all runs."
        )


def collect(plan: CampaignPlan, folder: Path | str | None = None, *, overwrite: bool = False) -> pd.DataFrame:
    """The table of all runs of the plan, in the plan's order; written to `folder` together with the curves.

    A run that is not finished has a row with its state, its budget and an empty loss, so that an unfinished campaign is
    recognised. Numbers are written with all their digits.

    Args:
        plan: The campaign's plan.
        folder: Folder for the tables; by default ``results/<campaign>`` under the root.
        overwrite: Replace the tables of another campaign.

    Raises:
        UserError: The folder has finished runs that this campaign does not have, or its tuning is not complete.
    """
    import pandas as pd

    refuse_untuned(plan.campaign)
    folder = plan.results if folder is None else Path(folder)
    if not overwrite:
        _refuse_loss(folder, plan)
    runs = pd.DataFrame([_run_row(plan, run) for run in plan.runs], columns=list(RUN_COLUMNS))
    curves = pd.DataFrame([row for run in plan.runs for row in _curve(plan, run)], columns=list(CURVE_COLUMNS))
    kinds = dict.fromkeys(("seed", *COUNTED), "int64") | dict.fromkeys(MEASURED, "float64")
    curves = curves.astype(kinds)
    # campaign.json is written last: after a kill in between, no file names a wrong campaign.
    (folder / COLLECTED_FILE).unlink(missing_ok=True)
    write_atomic(folder / "runs.csv", runs.to_csv(index=False).encode())
    write_atomic(folder / "curves.parquet", curves.to_parquet(index=False))
    if measured := [row for run in plan.runs for row in _dynamics(plan, run)]:
        dynamics = pd.DataFrame(measured, columns=list(DYNAMICS_COLUMNS))
        write_atomic(folder / "dynamics.parquet", dynamics.to_parquet(index=False))
    write_json(folder / COLLECTED_FILE, Collected(file=plan.campaign.file, identity=plan.campaign.identity))
    return runs


def _run_row(plan: CampaignPlan, run: PlannedRun) -> dict[str, Any]:
    now, record = status_and_record(plan, run)
    status, reason = now.state, now.reason
    parents: list[RunRecord] = []
    if record is not None:
        try:
            parents = charged_parents(plan.directory(run), run.spec.warm_start)
        except UserError as error:  # the run's cost is unknown, so it must not enter a fit
            record, status, reason = None, "failed", str(error)
    tokens = record.tokens if record else run.spec.budget.tokens
    flops = record.flops if record else {name: train_flops(run.spec.model, tokens, name) for name in CONVENTIONS}
    optimizer = run_optimizer_flops(run.spec, tokens) + sum(
        run_optimizer_flops(one.spec, one.tokens) for one in parents
    )
    paid = [record, *parents] if record else []
    processors = [one.cpu_seconds for one in paid if one.device.kind == "cpu" and one.cpu_seconds is not None]
    return run.identity | {
        "status": status,
        "params": run.parameters,
        "tokens": tokens,
        "flops": flops["6nd"],
        "flops_matmul": flops["matmul"],
        "flops_attention": flops["attention"],
        "flops_attention_full": flops["attention-full"],
        "flops_with_optimizer": flops["6nd"] + optimizer,
        "flops_attention_with_optimizer": flops["attention"] + optimizer,
        "loss": record.validation_loss if record else None,
        "train_loss": record.train_loss if record else None,
        "seconds": sum(one.seconds for one in paid) if record else None,
        "cpu_seconds": sum(processors) if record and len(processors) == len(paid) else None,
        "tokens_per_second": record.tokens_per_second if record else None,
        "peak_lr": run.spec.optimizer.peak_lr,
        "batch_tokens": run.spec.batch_tokens,
        "manifest": run.spec.data.manifest,
        "code": record.code.digest if record else None,
        "reason": reason,
    }


def _readable(read: Callable[[], list[T]]) -> list[T]:
    """The rows of one run's log; empty, with a sentence on stderr, if it cannot be read."""
    try:
        return read()
    except UserError as error:
        print(f"{error} Its rows are left out.", file=sys.stderr)
        return []


def _curve(plan: CampaignPlan, run: PlannedRun) -> list[dict[str, Any]]:
    # A continued run logs the steps after its checkpoint again; the last line of a step counts.
    rows = {row.step: row for row in _readable(plan.directory(run).metrics)}
    return [
        run.identity | {name: getattr(row, name) for name in (*COUNTED, *MEASURED)} for _, row in sorted(rows.items())
    ]


def _dynamics(plan: CampaignPlan, run: PlannedRun) -> list[dict[str, Any]]:
    rows = {row.step: row for row in _readable(plan.directory(run).dynamics)}
    found = []
    for _, row in sorted(rows.items()):
        quantities = {"update_rms": row.update_rms, "largest_logit": row.largest_logit, "svd_entropy": row.svd_entropy}
        if row.clipped_heads is not None:
            quantities["clipped_heads"] = {"all": float(row.clipped_heads)}
        found += [
            run.identity | {"step": row.step, "tokens": row.tokens, "quantity": quantity, "part": part, "value": value}
            for quantity, parts in quantities.items()
            for part, value in parts.items()
        ]
    return found
