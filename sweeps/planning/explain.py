"""The origin of each value of a planned run: a line of the campaign file, a rule, tuning, or a default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from scaling.errors import UserError, unknown_name
from sweeps.config.campaign import ArmConfig, campaign_path, campaign_tables
from sweeps.config.toml import read_toml
from sweeps.config.toml_text import KeyPath, key_lines, nearest_line
from sweeps.config.tuning_results import tuning_file
from sweeps.planning.plan import CampaignPlan, PlannedRun


class Origin(NamedTuple):
    """One value of a run and its origin."""

    field: str
    """Path of the field in spec.json, or under ``placement`` in placement.json."""
    value: Any
    origin: str


SEARCHED = {
    "optimizer.peak_lr": "peak_lr",
    "optimizer.weight_decay": "weight_decay",
    "schedule.warmup_tokens": "warmup",
    "schedule.final_fraction": "final_fraction",
}
"""Fields of a spec that tuning and rule files set, under their names there."""


def explain(plan: CampaignPlan, run: PlannedRun, file: str) -> list[Origin]:
    """The origin of every value of a run's spec and placement.

    Args:
        plan: The plan that has the run.
        run: One of its runs.
        file: Name or path of the campaign, whose lines are named.

    Raises:
        UserError: The campaign file changed since the plan was made.
    """
    values = {
        **dict(_leaves(msgspec.to_builtins(run.spec))),
        **dict(_leaves(msgspec.to_builtins(run.placement), "placement")),
    }
    finder = _Finder(plan, run, file)
    return [Origin(field, value, finder.origin(field)) for field, value in values.items()]


def explain_field(origins: list[Origin], field: str) -> list[Origin]:
    """The origins of one field, or of all fields of a table, by the last words of its path.

    Raises:
        UserError: There is no such field.
    """
    inside = f".{field}."
    found = [o for o in origins if f".{o.field}.".endswith(inside)] or [o for o in origins if inside in f".{o.field}."]
    if not found:
        raise UserError(unknown_name("field of this run", field, [o.field for o in origins]))
    return found


def _leaves(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        here = f"{path}.{name}" if path else name
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, here)
        elif inner is not None and inner != {}:
            yield here, inner


class _Finder:
    """Looks values up in the tables of a campaign, in the order of precedence that planning has."""

    def __init__(self, plan: CampaignPlan, run: PlannedRun, file: str) -> None:
        self.plan, self.run = plan, run
        self.arm: ArmConfig = next(arm for arm in plan.campaign.arms if arm.name == run.arm)
        path = campaign_path(file)
        self.tables = campaign_tables(path)
        self.name = path.name
        self.lines = key_lines(path.read_text(encoding="utf-8-sig")) if self.tables == read_toml(path) else {}
        self.in_arm: KeyPath = ("arms", [arm.name for arm in plan.campaign.arms].index(run.arm))
        rungs = [rung.name for rung in plan.campaign.rungs]
        self.in_rung: KeyPath = ("rungs", rungs.index(run.rung)) if run.rung in rungs else ("ladder",)

    def origin(self, field: str) -> str:
        """The origin of a field, in words."""
        first, _, rest = field.partition(".")
        last = field.rpartition(".")[2]
        if first != "placement" and (settled := self._settled(field)):
            return settled
        match first:
            case "model":
                return self._model(rest)
            case "budget" if last == "flops":
                return "counted: 6ND, from model and budget.tokens"
            case "budget":
                per = "times the parameters of the blocks, "
                named = self._first((*self.in_rung, "tokens")) or self._first(
                    (*self.in_rung, "tokens_per_parameter"), ("training", "tokens_per_parameter"), text=per
                )
                return self._rule("tokens") or named or f"rule of [ladder], {self._line(('ladder', 'rule'))}"
            case "batch_tokens":
                return self._rule(first) or self._line((*self.in_rung, first), ("training", first))
            case "optimizer":
                return self._optimizer(rest)
            case "schedule":
                key = last.removesuffix("_tokens")
                return self._line(("schedule", key), text="times budget.tokens, " if last != key else "")
            case "evaluation" | "data" if last != "manifest":
                return self._line((first, last))
            case "data":
                return f"SHA-256 of the manifest of {self.plan.data}"
            case "seed":
                return self._line((*self.in_rung, "seeds"), ("seeds",))
            case "placement":
                found = self._first(("placement", "rungs", self.run.rung, rest), ("placement", rest))
                return found or ("folder of the prepared data" if rest == "data" else "default")
            case "warm_start" | "branch_of":
                return self._line((*self.in_arm, first), ("schedule", "branches"))
        return self._line(("training", last))

    def _settled(self, field: str) -> str | None:
        """The origin of a hyper-parameter that tuning or a rule file set."""
        by_rung = self.plan.campaign.settings.get(self.arm.reuse or self.arm.name, {}).get(self.run.rung, {})
        key = SEARCHED.get(field, field.rpartition(".")[2])
        if not ({key, key.removeprefix("adamw_")} & by_rung.keys()):
            return None
        if self.arm.rule is not None:
            return f"rule file, {self._line((*self.in_arm, 'rule'))}"
        if self.plan.campaign.untuned:
            return "middle of the search range, until it is tuned (scaling tune)"
        return f"tuned: {tuning_file(self.plan.root, self.plan.campaign.name)}, arm {self.arm.reuse or self.arm.name}"

    def _model(self, rest: str) -> str:
        key = tuple(rest.split("."))
        if self.arm.family is not None and key[0] in ("family", "moe", "mla", "family_options"):
            return self._line((*self.in_arm, *key))
        return self._line((*self.in_rung, *key), ("model", *key))

    def _optimizer(self, rest: str) -> str:
        if rest == "name":
            return self._line((*self.in_arm, "optimizer"))
        if rest == "peak_lr":
            return self._rule(rest) or self._line(
                (*self.in_arm, rest, self.run.rung), (*self.in_arm, rest), (*self.in_rung, rest), ("training", rest)
            )
        return self._line((*self.in_arm, *rest.split(".")), ("training", rest))

    def _rule(self, name: str) -> str | None:
        """The origin of a value that a rule set gives."""
        from_arm = name == "peak_lr" and self.arm.rule is not None
        if from_arm or (self.plan.campaign.hyperparameters == "rule" and self.plan.campaign.rule):
            return f"hyper-parameter rule, {self._line((*self.in_arm, 'rule'), ('rule',))}"
        return None

    def _line(self, *paths: KeyPath, text: str = "") -> str:
        """The place of the first of some keys that the file has; else the default."""
        return self._first(*paths, text=text) or "default"

    def _first(self, *paths: KeyPath, text: str = "") -> str | None:
        for path in paths:
            value: Any = self.tables
            for step in path:
                try:
                    value = value[step]
                except (KeyError, IndexError, TypeError):
                    break
            else:
                line = nearest_line(self.lines, path)
                shown = ".".join(str(step) for step in path if isinstance(step, str))
                return f"{text}{shown}, {self.name}{f':{line}' if line else ''}"
        return None
