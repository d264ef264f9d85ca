"""The studies of a campaign for people: best so far, the bowls, trials left, FLOPs spent by arm."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scaling.console import console
from scaling.spec import as_dict
from sweeps.config.tuning_results import Bracket, StudyResult, Tuning
from sweeps.reporting.console import wide_enough

BARS = "▁▂▃▄▅▆▇█"
BINS = 12


def study_rows(tuning: Tuning) -> list[dict[str, Any]]:
    """One row a study as plain values: trials told, in flight and left, FLOPs, best loss and setting, brackets."""
    rows = []
    for study in tuning.studies:
        flying = sum(trial.state == "running" for trial in study.trials)
        row = as_dict(study) | {"in_flight": flying, "left": max(study.wanted - study.told - flying, 0)}
        del row["trials"]
        rows.append(row)
    return rows


def bowl(study: StudyResult, bracket: Bracket, *, log: bool = True) -> str:
    """The best loss in each part of the range, as bars: low is good, a dot is a part where nothing was tried."""
    import math

    def place(value: float) -> float:
        return math.log(value) if log and value > 0 and bracket.range_low > 0 else value

    low, high = place(bracket.range_low), place(bracket.range_high)
    best: list[float | None] = [None] * BINS
    for trial in study.trials:
        if trial.state == "finished" and trial.loss is not None and high > low:
            share = (place(trial.values[bracket.name]) - low) / (high - low)
            number = min(max(int(share * BINS), 0), BINS - 1)
            here = best[number]
            best[number] = trial.loss if here is None else min(here, trial.loss)
    losses = [loss for loss in best if loss is not None]
    if not losses:
        return "·" * BINS
    span = max(losses) - min(losses) or 1.0
    return "".join("·" if loss is None else BARS[round((loss - min(losses)) / span * (len(BARS) - 1))] for loss in best)


def show(tuning: Tuning) -> None:
    """Print `study_table`."""
    wide_enough(console()).print(study_table(tuning))


def study_table(tuning: Tuning) -> RenderableType:
    """Every study with its bowls, then what each arm has spent, the laws and what the transfer costs."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("arm", "rung", "told", "best", "searched", "bowl", "optimum", "verdict"):
        # The last two may fold, so that the table fits a narrow terminal with nothing cut off.
        folds = name in ("optimum", "verdict")
        table.add_column(name, no_wrap=not folds, justify="right" if name in ("told", "best") else "left")
    for study, row in zip(tuning.studies, study_rows(tuning), strict=True):
        flying = f" +{row['in_flight']}" if row["in_flight"] else ""
        head = [
            study.arm,
            study.rung + ("*" if study.held_out else ""),
            f"{study.told}/{study.wanted}{flying}",
            "" if study.best_loss is None else f"{study.best_loss:.4f}",
        ]
        if not study.brackets:
            table.add_row(*head)
        for bracket in study.brackets:
            found = f"{bracket.optimum:.3g}"
            if bracket.low is not None and bracket.high is not None:
                found += f" ({bracket.low:.2g} to {bracket.high:.2g})"
            style = {"bracketed": "green", "low edge": "red", "high edge": "red"}.get(bracket.verdict, "yellow")
            verdict = bracket.verdict + (f", widened {bracket.widened}x" if bracket.widened else "")
            table.add_row(*head, bracket.name, bowl(study, bracket), Text(found), Text(verdict, style=style))
            head = [""] * 4
    return Group(table, Text(), *(Text(line) for line in notes(tuning)))


def notes(tuning: Tuning) -> list[str]:
    """Sentences beside the table of studies: what was spent and is to come, edges, laws, what transfer costs."""
    held_out = any(study.held_out for study in tuning.studies)
    lines = ["* held out: the laws have not seen it."] if held_out else []
    lines += [
        f"{arm.arm}: {arm.trials} trials, {arm.flops:.3g} FLOPs" if arm.how == "tuned" else
        f"{arm.arm}: no trials of its own; takes over what was found for {arm.reuses}"
        for arm in tuning.arms
        if arm.how != "fixed"
    ]  # fmt: skip
    left = [(study.wanted - study.told, study.flops) for study in tuning.studies]
    if any(trials for trials, _ in left):
        most = "at most " if any(trial.short_run for study in tuning.studies for trial in study.trials) else ""
        flops = sum(trials * flops for trials, flops in left)
        lines.append(f"{sum(trials for trials, _ in left)} trials are to come, {most}{flops:.3g} FLOPs (6ND).")
    lines += [
        f"{study.arm}, {study.rung}: {bracket.name} ends on the {bracket.verdict}; {bracket.note}."
        for study in tuning.studies
        for bracket in study.brackets
        if bracket.note and study.told >= study.wanted
    ]
    for arm, laws in tuning.laws.items():
        for law in laws:
            if law.kind == "power":
                span = "" if law.low is None else f" (exponent {law.low:.2f} to {law.high:.2f})"
                text = f"{law.coefficient:.4g} C^{law.exponent:.3f}{span}"
            else:
                text = f"{law.coefficient:.4g} at any size"
            lines.append(f"{arm}: {law.name} = {text}" + (f"; {law.note}" if law.note else ""))
    lines += [
        f"{row.arm}, {row.rung}: its setting is carried {row.times:.2g} times beyond the compute that was tuned."
        for row in tuning.outside
    ]
    lines += [
        f"{row.arm}, {row.rung}: the law's setting gives {row.predicted_loss:.4f}, a search of its own {row.tuned_loss:.4f}: "
        f"the transfer costs {row.regret:+.4f} nats."
        for row in tuning.transfer
        if row.regret is not None
    ]
    return lines
