"""A fitted law as a TOML file that campaigns name where they would name a published rule: ``rule = "FILE.toml"``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from scaling.errors import Refusal, unknown_name
from scaling.records import write_atomic
from scaling.spec import Line, PositiveFloat, Strict
from sweeps.rules import Power, Rule
from sweeps.tomlfile import as_value, read_toml
from sweeps.tuning.facts import LawFacts, Tuning
from sweeps.tuning.space import Dimension, Values, known_searches

Exponent = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


class RulePower(Strict, frozen=True):
    """``coefficient * C**exponent`` with C in FLOPs, and what it is worth."""

    coefficient: Annotated[float, msgspec.Meta(gt=0.0, le=1e300)]
    exponent: Exponent
    low: Exponent | None = None
    """95 % interval of the exponent."""
    high: Exponent | None = None
    rungs: tuple[Line, ...] = ()
    note: Line = ""


class RuleFile(Strict, frozen=True):
    """The whole file."""

    label: Line
    source: Line
    arm: Line
    optimizer: Line
    computes: tuple[PositiveFloat, ...]
    """FLOPs of one run at each rung that was tuned; far outside, the law is a guess."""
    laws: dict[str, RulePower]
    """By hyper-parameter."""

    def rule(self) -> Rule:
        """The laws that a published rule can have, as one."""
        powers = {
            name: Power(coefficient=law.coefficient, compute=law.exponent)
            for name, law in self.laws.items()
            if name in ("peak_lr", "batch_tokens", "weight_decay")
        }
        return Rule(label=self.label, source=self.source, **powers)

    def values(self, compute: float, *, optimizer: str, context: int) -> Values:
        """Every hyper-parameter at a run of so many FLOPs, within the limits of the optimizer's row.

        Raises:
            Refusal: The optimizer has no hyper-parameter of a law's name.
        """
        rows = known_searches(optimizer)
        values = {}
        for name, law in self.laws.items():
            if name not in rows:
                raise Refusal(f"{self.label}: {unknown_name(f'hyper-parameter of {optimizer}', name, rows)}")
            power = Power(coefficient=law.coefficient, compute=law.exponent)
            expected = power.at(compute=compute, parameters=1.0, tokens=1.0)
            value = min(max(expected, rows[name].least), rows[name].most)
            values[name] = Dimension(search=rows[name]).rounded(value, context)
        return values


def rule_of(tuning: Tuning, arm: str) -> RuleFile:
    """What tuning found for an arm.

    Raises:
        Refusal: The arm was not tuned, or not to the end.
    """
    laws = tuning.laws.get(arm)
    if not laws:
        raise Refusal(
            f"{tuning.campaign}: there is no law for arm {arm}; those with one: {', '.join(tuning.laws) or 'none yet'}. "
            f"Run: scaling tune {tuning.campaign}"
        )
    studies = [study for study in tuning.studies if study.arm == arm and not study.held_out]
    return RuleFile(
        label=f"{arm} of {tuning.campaign}",
        source=f"fitted to the tuned rungs of campaign {tuning.campaign}: {', '.join(s.rung for s in studies)}",
        arm=arm,
        optimizer=studies[0].optimizer,
        computes=tuple(float(study.flops) for study in studies),
        laws={found.name: _power(found) for found in laws},
    )


def _power(found: LawFacts) -> RulePower:
    return RulePower(
        coefficient=found.coefficient,
        exponent=found.exponent,
        low=found.low,
        high=found.high,
        rungs=found.rungs,
        note=found.note,
    )


def write_rule_file(tuning: Tuning, arm: str, path: Path) -> Path:
    """The rule file of an arm, written with all digits; its path.

    Raises:
        Refusal: As `rule_of`.
    """
    rule = rule_of(tuning, arm)
    head = msgspec.structs.replace(rule, laws={})
    lines = [
        f"# {rule.label}. Each law is coefficient * C**exponent, C in FLOPs (6ND); low and high: 95 % of the exponent."
    ]
    for name in ("label", "source", "arm", "optimizer", "computes"):
        lines.append(f"{name} = {_toml(getattr(head, name))}")
    for name, law in rule.laws.items():
        lines += ["", f"[laws.{name}]"]
        for field in law.__struct_fields__:
            value = getattr(law, field)
            if value is not None:
                lines.append(f"{field} = {_toml(value)}")
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # JSON's strings and numbers are TOML's.
    return msgspec.json.encode(value).decode()


def read_rule_file(path: Path) -> RuleFile:
    """A rule file, strictly.

    Raises:
        Refusal: It is missing or is not one.
    """
    if not os.path.lexists(path):
        raise Refusal(f"{path}: there is no such rule file. Write one: scaling tune CAMPAIGN.")
    return as_value(read_toml(path), RuleFile, where=str(path))
