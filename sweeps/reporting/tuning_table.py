"""The studies of a campaign for people: best losses, loss profiles, remaining trials, FLOPs spent by arm."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scaling.console import console
from scaling.power_rule import PowerRule
from scaling.spec import as_dict
from sweeps.config.tuning_results import Bracket, StudyResult, Tuning
from sweeps.reporting.console import wide_enough

BARS = "▁▂▃▄▅▆▇█"
BINS = 12


def study_rows(tuning: Tuning) -> list[dict[str, Any]]:
    """A row for each study as plain values: trials completed, in flight and left, FLOPs, best setting, brackets."""
    rows = []
    for study in tuning.studies:
        in_flight = sum(trial.state == "running" for trial in study.trials)
        row = as_dict(study) | {"in_flight": in_flight, "left": max(study.planned - study.completed - in_flight, 0)}
        del row["trials"]
        rows.append(row)
    return rows


def loss_profile(study: StudyResult, bracket: Bracket) -> str:
    """The best loss in each part of a range as bars: low is good, a dot is a part without trials."""

    def position(value: float) -> float:
        return math.log(value) if value > 0 and bracket.range_low > 0 else value

    low, high = position(bracket.range_low), position(bracket.range_high)
    best = [math.inf] * BINS
    for trial in study.trials:
        if trial.state == "finished" and trial.loss is not None and high > low:
            share = (position(trial.values[bracket.name]) - low) / (high - low)
            number = min(max(int(share * BINS), 0), BINS - 1)
            best[number] = min(best[number], trial.loss)
    losses = [loss for loss in best if loss < math.inf]
    if not losses:
        return "·" * BINS
    lowest, span = min(losses), max(losses) - min(losses) or 1.0
    return "".join(BARS[round((loss - lowest) / span * (len(BARS) - 1))] if loss < math.inf else "·" for loss in best)


def show(tuning: Tuning) -> None:
    """Print `study_table`."""
    wide_enough(console()).print(study_table(tuning))


def study_table(tuning: Tuning) -> RenderableType:
    """Every study with its loss profiles, then `notes`."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("arm", "rung", "trials", "best", "searched", "loss", "optimum", "verdict"):
        # The last two columns may fold, so that a narrow terminal cuts nothing off.
        folds = name in ("optimum", "verdict")
        table.add_column(name, no_wrap=not folds, justify="right" if name in ("trials", "best") else "left")
    for study, row in zip(tuning.studies, study_rows(tuning), strict=True):
        in_flight = f" +{row['in_flight']}" if row["in_flight"] else ""
        head = [
            study.arm,
            study.rung + ("*" if study.held_out else ""),
            f"{study.completed}/{study.planned}{in_flight}",
            "" if study.best_loss is None else f"{study.best_loss:.4f}",
        ]
        if not study.brackets:
            table.add_row(*head)
        for bracket in study.brackets:
            optimum = f"{bracket.optimum:.3g}"
            if bracket.low is not None and bracket.high is not None:
                optimum += f" ({bracket.low:.2g} to {bracket.high:.2g})"
            style = {"bracketed": "green", "low edge": "red", "high edge": "red"}.get(bracket.verdict, "yellow")
            verdict = bracket.verdict + (f", widened {bracket.widened}x" if bracket.widened else "")
            table.add_row(*head, bracket.name, loss_profile(study, bracket), Text(optimum), Text(verdict, style=style))
            head = [""] * 4
    return Group(table, Text(), *(Text(line) for line in notes(tuning)))


def notes(tuning: Tuning) -> list[str]:
    """Sentences below the table of studies: cost, remaining trials, edges, rules, cost of the transfer."""
    lines = []
    if any(study.held_out for study in tuning.studies):
        lines.append("* held out: left out of the fit of the rules.")
    for arm in tuning.arms:
        if arm.how == "tuned":
            lines.append(f"{arm.arm}: {arm.trials} trials, {arm.flops:.3g} FLOPs")
        elif arm.how == "reused":
            lines.append(f"{arm.arm}: no trials of its own; uses the settings of {arm.reuses}")
    left = sum(study.planned - study.completed for study in tuning.studies)
    if left:
        at_most = "at most " if any(trial.short_run for study in tuning.studies for trial in study.trials) else ""
        flops = sum((study.planned - study.completed) * study.flops for study in tuning.studies)
        lines.append(f"{left} trials remain, {at_most}{flops:.3g} FLOPs (6ND).")
    lines += [
        f"{study.arm}, {study.rung}: the best {bracket.name} is on the {bracket.verdict} of the search; {bracket.note}."
        for study in tuning.studies
        for bracket in study.brackets
        if bracket.note and study.completed >= study.planned
    ]
    lines += [
        f"{arm}: {name} = {_rule_text(rule)}" for arm, rules in tuning.rules.items() for name, rule in rules.items()
    ]
    lines += [
        f"{row.arm}, {row.rung}: its setting is extrapolated {row.times:.2g} times beyond the tuned compute."
        for row in tuning.outside
    ]
    lines += [
        f"{row.arm}, {row.rung}: loss {row.predicted_loss:.4f} at the rules' setting, {row.tuned_loss:.4f} at the best of "
        f"its own search: the transfer costs {row.regret:+.4f} nats."
        for row in tuning.transfer
        if row.regret is not None
    ]
    return lines


def _rule_text(rule: PowerRule) -> str:
    if rule.constant:
        text = f"{rule.coefficient:.4g} at any size"
    else:
        span = "" if rule.interval is None else " (exponent {:.2f} to {:.2f})".format(*rule.interval)
        text = f"{rule.coefficient:.4g} C^{rule.exponent:.3f}{span}"
    return text + (f"; {rule.note}" if rule.note else "")
