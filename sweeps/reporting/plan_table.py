"""A plan for the reader: as rows for machines, and as tables for people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from scaling.flops import train_flops
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.spec import as_dict
from scaling.units import human, pflops_days
from sweeps.planning.cost import assumption, plan_costs, slots, tuning_hours, wall_hours
from sweeps.planning.plan import CampaignPlan
from sweeps.reporting.console import wide_enough


def plan(planned: CampaignPlan) -> None:
    """Print `plan_table`."""
    wide_enough(Console()).print(plan_table(planned))


def groups(planned: CampaignPlan) -> None:
    """Print which parameters each arm's optimizer gets, and by which rule, for every different model and arm.

    The first block stands for the others, which are like it.
    """
    import torch

    from scaling.models.registry import build_model
    from scaling.optim.registry import assign

    console = Console()
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
                table.add_row(claimed.name, size, claimed.algorithm, claimed.view, Text(claimed.rule))
        console.print(table, Text())


def plan_rows(plan: CampaignPlan) -> list[dict[str, Any]]:
    """The plan as plain values, one row a run; what ``--json`` prints.

    Counts and rates are exact; ``printed`` holds what a paper prints for the rung, as strings.
    """
    costs = plan_costs(plan)
    printed = {rung.name: rung.printed for rung in plan.rungs}
    rows = []
    for run in plan.runs:
        spec, cost = run.spec, costs[run.id]
        rows.append(run.identity | {
            "provisional": plan.provisional,
            "state": plan.state(run),
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
            "batch_windows": spec.batch_tokens // spec.model.context,
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


def plan_totals(plan: CampaignPlan) -> dict[str, Any]:
    """Sums over the campaign's distinct runs: how many, FLOPs, hours, and what is left of them."""
    costs = plan_costs(plan)
    runs = plan.distinct()
    states = {run.id: plan.state(run) for run in runs}
    left = [run for run in runs if states[run.id] not in ("finished", "diverged")]
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
        "hours_left": sum(costs[run.id].hours for run in left),
        "gpu_hours": sum(hours for hours, _ in spent),
        "tuning_gpu_hours": sum(hours for hours, _ in tuning),
        "runs_at_once": at_once,
        "wall_hours_left": wall_hours((costs[run.id].hours for run in left), at_once),
        "price": _priced((hours, table.price) for hours, table in spent),
        "kilowatt_hours": _priced(
            (hours, None if table.watts is None else table.watts / 1e3) for hours, table in spent
        ),
        "bases": sorted({costs[run.id].basis for run in runs}),
    }


MOST_FORESEEN = 200
"""Runs up to which `to_go` reads all records at every look."""


def to_go(plan: CampaignPlan) -> list[str]:
    """What is left of a campaign in a sentence, as `plan_totals` predicts it; nothing where all is done or runs are many."""
    if len(plan.runs) > MOST_FORESEEN:
        return []
    totals = plan_totals(plan)
    if not totals["hours_left"]:
        return []
    left = f"{hours_text(totals['hours_left'])} of training to go"
    wait = f"{hours_text(totals['wall_hours_left'])} to wait at {totals['runs_at_once']} at once"
    basis = "assumed speed" if "assumed" in totals["bases"] else "from finished runs"
    whole = [f"price of the whole {totals['price']:,.2f}"] if totals["price"] is not None else []
    whole += [f"{totals['kilowatt_hours']:,.3g} kWh" if totals["kilowatt_hours"] is not None else ""]
    return ["; ".join(part for part in (left, wait, *whole) if part) + f" ({basis})."]


def _priced(parts: Iterable[tuple[float, float | None]]) -> float | None:
    """Hours times a rate, summed; None unless every part has one."""
    known = list(parts)
    if any(rate is None for _, rate in known):
        return None
    return sum(hours * rate for hours, rate in known if rate is not None)


def rate_text(rate: float) -> str:
    """A learning rate as papers print it: 0.02, 9.503e-4."""
    if rate >= 1e-3:
        return f"{rate:.4g}"
    digits, exponent = f"{rate:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def hours_text(hours: float) -> str:
    """A length of time in the unit that a person would use."""
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def plan_table(plan: CampaignPlan) -> RenderableType:
    """The plan as a table with its totals, and what the hours rest on."""
    rows = plan_rows(plan)
    printed = any(row["printed"] for row in rows)
    title = plan.campaign.title or plan.campaign.name
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in ("arm", "rung", "shape"):
        table.add_column(name, no_wrap=True)
    for name in ("N", "D", "C", "batch", "peak LR", "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    # A fresh plan fits a terminal of 80 columns without a column that says "planned" in every row.
    states = any(row["state"] != "planned" for row in rows)
    if states:
        table.add_column("state", no_wrap=True)
    seeds = len({row["seed"] for row in rows}) > 1
    for row in rows:
        windows = f" = {row['batch_windows']}x{row['shape']['context']}" if printed else ""
        table.add_row(
            row["arm"],
            row["cell"] if seeds else row["rung"],
            f"{row['layers']}x{row['width']}/{row['heads']}",
            row["parameters_text"] if row["parameters"] >= 1e8 else human(row["parameters"]),
            f"{row['tokens'] / 1e9:.2f}B" if row["tokens"] >= 1e9 else human(row["tokens"]),
            f"{row['flops']:.2e}".replace("e+", "e"),
            f"{row['batch_tokens']:,}{windows}",
            rate_text(row["peak_lr"]),
            f"{row['steps']:,}",
            hours_text(row["hours"]),
            *([row["state"]] if states else []),
        )
    return Group(table, Text(), *(Text(line) for line in _notes(plan)))


def _beside(plan: CampaignPlan) -> str:
    """What 6ND leaves out, as shares of it over the runs."""

    def span(shares: Iterable[float]) -> str:
        ends = [f"{end:.2g} %" if end < 10 else f"{end:.0f} %" for end in _ends(100 * share for share in shares)]
        return " to ".join(dict.fromkeys(ends))

    attention = span(
        train_flops(run.spec.model, 1, "attention") / train_flops(run.spec.model, 1) - 1 for run in plan.runs
    )
    optimizers = ", ".join(
        f"{arm.name} {span(run_optimizer_flops(r.spec) / r.spec.budget.flops for r in plan.runs if r.arm == arm.name)}"
        for arm in plan.campaign.arms
    )
    return f"Beside 6ND: head and causal attention {attention}; matrix products of the optimizer: {optimizers}."


def _ends(values: Iterable[float]) -> tuple[float, float]:
    known = sorted(values)
    return known[0], known[-1]


def _spending(totals: dict[str, Any], *, cuda: bool) -> str:
    """Device time, waiting time, money and energy in a sentence."""
    parts = [f"{totals['gpu_hours']:,.3g} {'GPU-hours' if cuda else 'hours of runs'}"]
    if totals["tuning_gpu_hours"]:
        parts[0] += f", {totals['tuning_gpu_hours']:,.3g} of them for tuning"
    parts.append(f"{hours_text(totals['wall_hours_left'])} to wait at {totals['runs_at_once']} at once, tuning aside")
    if totals["price"] is not None:
        parts.append(f"price {totals['price']:,.2f}")
    if totals["kilowatt_hours"] is not None:
        parts.append(f"{totals['kilowatt_hours']:,.3g} kWh")
    return "; ".join(parts) + "."


def _notes(plan: CampaignPlan) -> list[str]:
    totals = plan_totals(plan)
    arms = ", ".join(arm.name for arm in plan.campaign.arms)
    done = f"{totals['finished']} finished" + (f", {totals['diverged']} diverged" if totals["diverged"] else "")
    lines = [
        "shape: layers x width / heads. N: weights of the blocks. D: tokens. C: FLOPs, 6ND.",
        f"{len(plan.rungs)} rung{'' if len(plan.rungs) == 1 else 's'} x {arms} = {totals['runs']} runs, {done}. {totals['flops']:.3g} FLOPs, "
        f"{hours_text(totals['hours'])} of training one after the other, {hours_text(totals['hours_left'])} to go.",
    ]
    lines += [_spending(totals, cuda=any(table.accelerator != "cpu" for table in plan.placements.values()))]
    lines.append(_beside(plan))
    if "assumed" in totals["bases"]:
        kinds = dict.fromkeys(assumption(table) for table in plan.placements.values())
        lines += [f"Hours are {kind}." for kind in kinds]
    elif totals["bases"] != ["itself"]:
        lines.append(
            "Hours of runs that are not done come from finished runs like them; those of other sizes from what layers, "
            "activations and matrix products took there."
        )
    if plan.provisional:
        lines.append(
            f"The data are not prepared yet ({plan.data}); run ids are provisional until they are. "
            "Submitting prepares them, and so does: scaling data prepare CAMPAIGN."
        )
    return lines
