"""``scaling plan``: a plan as rows of plain values and as a table, with predicted time and cost and their basis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scaling.console import console
from scaling.flops import train_flops
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.optim.registry import OPTIMIZERS
from scaling.run.provenance import changed_files
from scaling.run.record import RunState
from scaling.spec import as_dict
from scaling.units import human, pflops_days
from sweeps.config.campaign import Campaign
from sweeps.planning.cost import (
    Basis,
    Measured,
    Outlook,
    assumption,
    hours_text,
    measured_runs,
    outlook,
    plan_costs,
    records_under,
    slots,
    tuning_hours,
    wall_hours,
)
from sweeps.planning.ladder import widened
from sweeps.planning.plan import CampaignPlan
from sweeps.planning.tuned_settings import untuned_note
from sweeps.reporting.console import wide_enough


def plan(planned: CampaignPlan) -> None:
    """Print `plan_table`."""
    wide_enough(console()).print(plan_table(planned))


def groups(planned: CampaignPlan) -> None:
    """Print the algorithm of each parameter and the rule that assigns it, for every arm.

    Only the first block is shown; the other blocks are like it.
    """
    import torch

    from scaling.models.registry import build_model
    from scaling.optim.registry import assign

    to = console()
    run_of_arm = {run.arm: run for run in planned.runs}
    for arm, run in run_of_arm.items():
        with torch.device("meta"):
            model = build_model(run.spec.model)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        table = Table(
            title=f"{arm}, rung {run.rung}", title_justify="left", header_style="bold", box=None, pad_edge=False
        )
        for column in ("parameter", "shape", "algorithm", "seen as", "rule"):
            table.add_column(column, overflow="fold")
        for claimed in assign(run.spec.optimizer, shapes):
            if not re.match(r"blocks\.[1-9]", claimed.name):
                size = " x ".join(map(str, claimed.shape))
                table.add_row(claimed.name, size, claimed.algorithm.name, claimed.view, Text(claimed.rule))
        to.print(table, Text())


def plan_rows(plan: CampaignPlan, seen: Outlook | None = None) -> list[dict[str, Any]]:
    """The plan as plain values, one row a run: the output of ``--json``.

    Counts and rates are exact; ``printed`` holds the values that a paper prints for the rung, as strings.
    """
    seen = seen or outlook(plan)
    printed = {rung.name: rung.printed for rung in plan.rungs}
    rows = []
    for run in plan.runs:
        spec, cost = run.spec, seen.costs[run.id]
        rows.append(run.identity | {
            "provisional": plan.provisional,
            "state": seen.states[run.id],
            "shape": as_dict(spec.model) | {"ffn_width": spec.model.ffn_width, "head_size": spec.model.head_size},
            "layers": spec.model.layers,
            "width": spec.model.width,
            "heads": spec.model.heads,
            "parameters": run.parameters,
            "parameters_text": f"{run.parameters / 1e6:.1f}M",
            "tokens": spec.budget.tokens,
            "tokens_per_parameter": spec.budget.tokens / run.parameters,
            "flops": spec.budget.flops,
            "pflops_days": pflops_days(spec.budget.flops),
            "flops_attention": train_flops(spec.model, spec.budget.tokens, "attention"),
            "optimizer_flops": run_optimizer_flops(spec),
            "batch_tokens": spec.batch_tokens,
            "batch_sequences": spec.batch_tokens // spec.model.context,
            "optimizer": spec.optimizer.name,
            "peak_lr": spec.optimizer.peak_lr,
            "weight_decay": spec.optimizer.weight_decay,
            "steps": spec.steps,
            "hours": cost.hours,
            "hours_basis": cost.basis,
            "hours_explanation": cost.explanation,
            "printed": printed[run.rung],
        })  # fmt: skip
    return rows


def plan_totals(
    plan: CampaignPlan, seen: Outlook | None = None, *, shares: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Sums over the campaign's distinct runs: number, FLOPs, hours and the remaining hours.

    Without the completed `shares` of runs, by id, a run that has not ended counts as not started.
    """
    seen, shares = seen or outlook(plan), shares or {}
    states, costs = seen.states, seen.costs
    runs = plan.distinct()
    left = [run for run in runs if states[run.id] not in ("finished", "diverged")]
    hours_left = [costs[run.id].hours * (1.0 - shares.get(run.id, 0.0)) for run in left]
    tuning = tuning_hours(plan, costs)
    spent = [(costs[run.id].gpu_hours, plan.placements[run.rung]) for run in runs] + tuning
    at_once = min(slots(table) for table in plan.placements.values())
    return {
        "runs": len(runs),
        "finished": sum(state == "finished" for state in states.values()),
        "diverged": sum(state == "diverged" for state in states.values()),
        "tokens": sum(run.spec.budget.tokens for run in runs),
        "flops": sum(run.spec.budget.flops for run in runs),
        "hours": sum(costs[run.id].hours for run in runs),
        "hours_left": sum(hours_left),
        "gpu_hours": sum(hours for hours, _ in spent),
        "tuning_gpu_hours": sum(hours for hours, _ in tuning),
        "runs_at_once": at_once,
        "wall_hours_left": wall_hours(hours_left, at_once),
        "price": _priced((hours, table.price) for hours, table in spent),
        "kilowatt_hours": _priced(
            (hours, None if table.watts is None else table.watts / 1e3) for hours, table in spent
        ),
        "bases": sorted({costs[run.id].basis for run in runs}),
        "bases_left": sorted({costs[run.id].basis for run in left}),
    }


MAX_RECORDS_FOR_STATUS = 200
"""Size of a campaign up to which `remaining_cost` reads the records of other campaigns under the root."""


def remaining_cost(
    plan: CampaignPlan, states: dict[str, RunState], *, shares: Mapping[str, float], speeds: Mapping[str, float]
) -> list[str]:
    """A sentence on the time and money that a campaign still needs; none if all runs are done.

    `speeds`, in tokens per second of runs that are done or under way, replace assumed speeds.
    """
    measured = measured_runs(records_under(plan.root)) if len(plan.runs) <= MAX_RECORDS_FOR_STATUS else {}
    for run in plan.distinct():
        if run.id in speeds and run.id not in measured:
            table = plan.placements[run.rung]
            rate = speeds[run.id] / table.processes
            measured[run.id] = Measured(spec=run.spec, cuda=table.on_cuda, tokens_per_second=rate)
    totals = plan_totals(plan, Outlook(states=states, costs=plan_costs(plan, measured)), shares=shares)
    if not totals["hours_left"]:
        return []
    basis = "assumed" if "assumed" in totals["bases_left"] else "measured"
    parts = [f"{hours_text(totals['hours_left'])} of training left at {basis} speed", _wait(totals), *_money(totals)]
    return ["; ".join(parts) + "."]


def _wait(totals: dict[str, Any]) -> str:
    at_once = totals["runs_at_once"]
    together = "one run at a time" if at_once == 1 else f"{at_once} runs at a time"
    return f"{hours_text(totals['wall_hours_left'])} to wait with {together}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _money(totals: dict[str, Any]) -> list[str]:
    price, energy = totals["price"], totals["kilowatt_hours"]
    parts = [f"{price:,.2f} in all"] if price is not None else []
    return parts + ([f"{_amount(energy)} kWh in all"] if energy is not None else [])


def _priced(parts: Iterable[tuple[float, float | None]]) -> float | None:
    """Sum of hours times rates; None unless every part has a rate."""
    amounts = [None if rate is None else hours * rate for hours, rate in parts]
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def arm_labels(campaign: Campaign) -> dict[str, str]:
    """Label of each arm: its name, or the label of its optimizer if it is named after it."""
    return {
        arm.name: OPTIMIZERS[arm.optimizer].label if arm.name == arm.optimizer else arm.name for arm in campaign.arms
    }


def rate_text(rate: float) -> str:
    """A learning rate as papers print it: 0.02, 9.503e-4."""
    if rate >= 1e-3:
        return f"{rate:.4g}"
    digits, exponent = f"{rate:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


MAX_ROWS = 300
"""Rows of a table on the terminal; ``--json`` prints all of them."""


def plan_table(plan: CampaignPlan) -> RenderableType:
    """The plan as a table, with its totals and the basis of its times."""
    seen = outlook(plan)
    rows = plan_rows(plan, seen)
    labels, printed = arm_labels(plan.campaign), any(row["printed"] for row in rows)
    # One space between columns: with it a table of long names and a state still fits 80 columns.
    table = Table(header_style="bold", box=None, pad_edge=False, collapse_padding=True, title_justify="left")
    table.title = plan.campaign.title or plan.campaign.name
    for name in ("arm", "rung", "shape"):
        table.add_column(name, no_wrap=True)
    for name in ("N", "D", "C", "batch", "peak LR", "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    # Without a column of "planned" in every row, a new plan fits a terminal of 80 columns.
    states = any(row["state"] != "planned" for row in rows)
    if states:
        table.add_column("state", no_wrap=True)
    seeds = len({row["seed"] for row in rows}) > 1
    for row in rows[:MAX_ROWS]:
        sequences = f"{row['batch_sequences']}x{row['shape']['context']}"
        table.add_row(
            labels[row["arm"]],
            row["cell"] if seeds else row["rung"],
            f"{row['layers']}x{row['width']}/{row['heads']}",
            row["parameters_text"] if row["parameters"] >= 1e8 else human(row["parameters"]),
            f"{row['tokens'] / 1e9:.2f}B" if row["tokens"] >= 1e9 else human(row["tokens"]),
            f"{row['flops']:.2e}".replace("e+", "e"),
            sequences if printed else f"{row['batch_tokens']:,}",
            rate_text(row["peak_lr"]),
            f"{row['steps']:,}",
            hours_text(row["hours"]),
            *([row["state"]] if states else []),
        )
    more = [f"{len(rows) - MAX_ROWS:,} more rows; --json prints all."] if len(rows) > MAX_ROWS else []
    return Group(table, *map(Text, more), Text(), *(Text(line) for line in _notes(plan, seen)))


def _other_flops(plan: CampaignPlan) -> str:
    """A sentence on the FLOPs that 6ND leaves out, as shares of 6ND."""

    def span(shares: Iterable[float]) -> str:
        known = sorted(100 * share for share in shares)
        ends = [f"{end:.2g} %" if end < 10 else f"{end:.0f} %" for end in (known[0], known[-1])]
        return " to ".join(dict.fromkeys(ends))

    attention = span(
        train_flops(run.spec.model, 1, "attention") / train_flops(run.spec.model, 1) - 1 for run in plan.runs
    )
    optimizers = ", ".join(
        f"{span(run_optimizer_flops(r.spec) / r.spec.budget.flops for r in plan.runs if r.arm == arm)} ({label})"
        for arm, label in arm_labels(plan.campaign).items()
    )
    return f"Not counted in 6ND: head and causal attention {attention}; the optimizer's matrix products {optimizers}."


def _bases(plan: CampaignPlan, seen: Outlook) -> list[str]:
    """Sentences on the basis of the predicted times, each with its arms and number of runs if there are several."""
    runs = [run for run in plan.distinct() if seen.states[run.id] not in ("finished", "diverged")]
    labels, found = arm_labels(plan.campaign), dict[Basis, list[str]]()
    for run in runs:
        found.setdefault(seen.costs[run.id].basis, []).append(labels[run.arm])
    lines = []
    for basis, arms in sorted(found.items()):
        which = "Times" if len(found) == 1 else f"Times of {len(arms)} runs ({', '.join(dict.fromkeys(arms))})"
        if basis == "assumed":
            kinds = dict.fromkeys(assumption(table) for table in plan.placements.values())
            lines += [f"{which} assume {kind}." for kind in kinds]
        elif basis == "like":
            lines.append(f"{which} come from finished runs of the same shape and optimizer.")
        elif basis == "fitted":
            lines.append(f"{which} come from a fit to finished runs of other sizes or optimizers.")
    return lines


def code_notes(trained_by: Iterable[tuple[str | None, tuple[str, ...] | None]]) -> list[str]:
    """Sentences on runs that other code trained, from the commit and changed files of each; equal cases together."""
    lines = []
    for (commit, files), count in Counter(trained_by).items():
        runs = "1 run was" if count == 1 else f"{count:,} runs were"
        named = f"commit {commit[:10]}" if commit else "unknown commit"
        if files is None:
            lines.append(
                f"{runs} recorded without hashes of the code ({named}), so it is unknown whether this code trained them."
            )
        elif files:
            shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
            differ = "1 file differs" if len(files) == 1 else f"{len(files)} files differ"
            lines.append(
                f"{runs} trained by other code: {named}, {differ} ({shown}). To train them again: submit --rerun changed-code; the old run "
                "directories are kept."
            )
    return lines


def _notes(plan: CampaignPlan, seen: Outlook) -> list[str]:
    totals = plan_totals(plan, seen)
    rungs, arms = len(plan.rungs), arm_labels(plan.campaign).values()
    counts = f"{rungs} rung{'s' * (rungs != 1)}, {len(arms)} arm{'s' * (len(arms) != 1)} ({', '.join(arms)})"
    diverged = f", {totals['diverged']} diverged" if totals["diverged"] else ""
    unit = "GPU-hours" if any(table.gpus for table in plan.placements.values()) else "hours of runs"
    cost = [f"{_amount(totals['gpu_hours'])} {unit}"]
    if totals["tuning_gpu_hours"]:
        cost[0] += f", {_amount(totals['tuning_gpu_hours'])} of them for tuning"
    lines = [
        "shape: layers x width / heads. N: parameters of the blocks. D: tokens. C: FLOPs, 6ND. batch: tokens"
        + (" (sequences x context)." if any(rung.printed for rung in plan.rungs) else "."),
        f"{counts}: {totals['runs']} runs, {totals['finished']} finished{diverged}.",
        f"{totals['flops']:.3g} FLOPs; {hours_text(totals['hours'])} of training, {hours_text(totals['hours_left'])} left; "
        f"{_wait(totals)}{', without tuning' if totals['tuning_gpu_hours'] else ''}.",
        "; ".join([*cost, *_money(totals)]) + ".",
        _other_flops(plan),
    ]
    lines += [sentence] if (sentence := widened(list(plan.rungs))) else []
    lines += _bases(plan, seen)
    lines += untuned_note(plan.campaign)
    lines += code_notes((code.commit, changed_files(code)) for code in seen.code)
    if plan.provisional:
        lines.append(
            f"The data are not prepared yet ({plan.data}), so run ids will change. Submitting prepares the data, and so "
            "does: scaling data prepare CAMPAIGN"
        )
    return lines
