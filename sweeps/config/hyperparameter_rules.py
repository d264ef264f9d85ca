"""Published rules for hyper-parameters: learning rate, batch and tokens as power laws of compute, size and data.

A rule is data, one row each in `RULES`, with its source. It was fitted on somebody's models and somebody's text; that it
holds for others is assumed, and a plan that uses one says which. To add a rule, add a row.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.io import Line, PositiveFloat, Strict, write_atomic
from sweeps.config.search_space import Dimension, Values, known_searches
from sweeps.config.toml import as_value, read_toml
from sweeps.config.tuning_results import FittedRule, Tuning


class Power(Strict, frozen=True):
    """``coefficient * C**compute * N**parameters * D**tokens``, with C in FLOPs, N in parameters, D in tokens."""

    coefficient: float
    compute: float = 0.0
    """Exponent of C."""
    parameters: float = 0.0
    """Exponent of N."""
    tokens: float = 0.0
    """Exponent of D."""

    def at(self, *, compute: float, parameters: float, tokens: float) -> float:
        """The law's value at a run of compute C, size N and data D.

        Raises:
            ConfigError: It is too large for a number.
        """
        try:
            value = self.coefficient * compute**self.compute * parameters**self.parameters * tokens**self.tokens
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ConfigError(
                f"a rule gives no finite value at {compute:.3g} FLOPs, {parameters:.3g} parameters and {tokens:.3g} tokens. "
                "Use another rule or another size."
            )
        return float(value)


class HyperparameterRule(Strict, frozen=True):
    """One row of `RULES`; a quantity that the source gives no law for is None."""

    label: str
    source: str
    parameters: Power | None = None
    """Compute-optimal N, non-embedding, a law of C alone."""
    tokens: Power | None = None
    """Compute-optimal D, a law of C alone."""
    peak_lr: Power | None = None
    """Peak learning rate of AdamW."""
    batch_tokens: Power | None = None
    """Batch in tokens."""
    weight_decay: Power | None = None

    def optimal_parameters(self, compute: float) -> float:
        """N that the rule spends `compute` FLOPs on.

        Raises:
            ConfigError: The rule has no law for the size.
        """
        return self._sizes().at(compute=compute, parameters=1.0, tokens=1.0)

    def compute_for(self, parameters: float) -> float:
        """FLOPs at which a model of N parameters is compute-optimal; the inverse of `optimal_parameters`.

        Raises:
            ConfigError: The rule has no law for the size.
        """
        law = self._sizes()
        return float((parameters / law.coefficient) ** (1 / law.compute))

    def optimal_tokens(self, compute: float) -> float:
        """D that the rule spends `compute` FLOPs on.

        Raises:
            ConfigError: The rule has no law for the data.
        """
        if self.tokens is None:
            raise self._lacks("how many tokens to train on")
        return self.tokens.at(compute=compute, parameters=1.0, tokens=1.0)

    def _sizes(self) -> Power:
        if self.parameters is None:
            raise self._lacks("how large a model to train")
        return self.parameters

    def _lacks(self, what: str) -> ConfigError:
        able = [name for name, rule in RULES.items() if rule.parameters and rule.tokens]
        return ConfigError(f"{self.label} does not say {what}; rules that do: {', '.join(sorted(able))}.")


RULES: dict[str, HyperparameterRule] = {
    "moonlight": HyperparameterRule(
        label="Moonlight, Table 9",
        source="arXiv:2502.16982, Appendix B, Table 9; AdamW, C = 6ND, batch in tokens",
        parameters=Power(coefficient=0.0483359, compute=0.5112684),
        tokens=Power(coefficient=3.4480927, compute=0.4887316),
        peak_lr=Power(coefficient=0.0127339, compute=-0.0574752),
        batch_tokens=Power(coefficient=0.0065202, compute=0.4137915),
    ),
    "moonlight-table-2": HyperparameterRule(
        # The paper's runs do not follow its own law for the small sizes; these pass through what the runs used:
        # within 0.2 % for the rate, within 4.4 % for the batch, which was rounded by hand to multiples of 32.
        label="fits through Moonlight's Table 2",
        source="our least squares through arXiv:2502.16982, Table 2, against C = 6ND with the true N",
        parameters=Power(coefficient=0.0483359, compute=0.5112684),
        tokens=Power(coefficient=3.4480927, compute=0.4887316),
        peak_lr=Power(coefficient=0.006915, compute=-0.0447),
        batch_tokens=Power(coefficient=8.13e-5 * 8192, compute=0.315),
    ),
    "deepseek-llm": HyperparameterRule(
        label="DeepSeek LLM",
        source="arXiv:2401.02954, equation 1; C = MD with M the non-embedding FLOPs a token",
        peak_lr=Power(coefficient=0.3118, compute=-0.1250),
        batch_tokens=Power(coefficient=0.2920, compute=0.3271),
    ),
    "step-law": HyperparameterRule(
        label="Step Law",
        source="arXiv:2503.04715, equation 1; N non-embedding",
        peak_lr=Power(coefficient=1.79, parameters=-0.713, tokens=0.307),
        batch_tokens=Power(coefficient=0.58, tokens=0.571),
    ),
    "chinchilla": HyperparameterRule(
        label="20 tokens a parameter",
        source="the usual rounding of arXiv:2203.15556, with C = 6ND",
        parameters=Power(coefficient=120**-0.5, compute=0.5),
        tokens=Power(coefficient=20 * 120**-0.5, compute=0.5),
    ),
}


def rule(name: str) -> HyperparameterRule:
    """The row of a rule, or what a rule file says (`sweeps.config.hyperparameter_rules`), which is named by its path.

    Raises:
        ConfigError: There is none of that name, or the file cannot be used.
    """
    if name.endswith(".toml"):
        return read_rule_file(Path(name)).rule()
    if name not in RULES:
        raise ConfigError(unknown_name("rule", name, RULES))
    return RULES[name]


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

    def rule(self) -> HyperparameterRule:
        """The laws that a published rule can have, as one."""
        powers = {
            name: Power(coefficient=law.coefficient, compute=law.exponent)
            for name, law in self.laws.items()
            if name in ("peak_lr", "batch_tokens", "weight_decay")
        }
        return HyperparameterRule(label=self.label, source=self.source, **powers)

    def values(self, compute: float, *, optimizer: str, context: int) -> Values:
        """Every hyper-parameter at a run of so many FLOPs, within the limits of the optimizer's row.

        Raises:
            ConfigError: The optimizer has no hyper-parameter of a law's name.
        """
        rows = known_searches(optimizer)
        values = {}
        for name, law in self.laws.items():
            if name not in rows:
                raise ConfigError(f"{self.label}: {unknown_name(f'hyper-parameter of {optimizer}', name, rows)}")
            power = Power(coefficient=law.coefficient, compute=law.exponent)
            expected = power.at(compute=compute, parameters=1.0, tokens=1.0)
            value = min(max(expected, rows[name].least), rows[name].most)
            values[name] = Dimension(search=rows[name]).rounded(value, context)
        return values


def rule_of(tuning: Tuning, arm: str) -> RuleFile:
    """What tuning found for an arm.

    Raises:
        ConfigError: The arm was not tuned, or not to the end.
    """
    laws = tuning.laws.get(arm)
    if not laws:
        raise ConfigError(
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


def _power(found: FittedRule) -> RulePower:
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
        ConfigError: As `rule_of`.
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
        ConfigError: It is missing or is not one.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: there is no such rule file. Write one: scaling tune CAMPAIGN.")
    return as_value(read_toml(path), RuleFile, where=str(path))
