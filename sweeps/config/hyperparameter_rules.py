"""Hyper-parameter rules: learning rate, batch, model size and tokens as powers of compute, parameters and data.

A rule set is data: a row of `RULES` with its source, or a TOML file in the same format, such as ``scaling tune`` writes.
Each was fitted to particular models and text; that it holds for others is assumed, and a plan names the set it uses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.io import MAX_NUMBER, Line, PositiveFloat, Strict, write_atomic
from scaling.power_rule import PowerRule
from sweeps.config.search_space import Dimension, Values, known_searches
from sweeps.config.toml import as_value, read_toml
from sweeps.config.toml_text import toml_text
from sweeps.config.tuning_results import Tuning


class RuleSet(Strict, frozen=True):
    """Hyper-parameter rules from one source."""

    label: Line
    source: Line
    rules: dict[str, PowerRule]
    """By hyper-parameter; ``parameters`` (non-embedding) and ``tokens`` are the compute-optimal N and D, rules of C."""
    arm: Line = ""
    """Tuned arm that the rules were fitted to; empty for published ones."""
    optimizer: Line = ""
    computes: tuple[PositiveFloat, ...] = ()
    """FLOPs of one run at each tuned rung; far outside them the rules are guesses."""

    def value(self, name: str, *, compute: float, parameters: float = 1.0, tokens: float = 1.0) -> float:
        """The value of one hyper-parameter at compute C, size N and data D.

        Raises:
            ConfigError: The set has no rule for it, or the rule gives no usable value.
        """
        value = self._rule(name).value(compute=compute, parameters=parameters, tokens=tokens)
        if not 0.0 < value <= MAX_NUMBER:
            raise ConfigError(
                f"the rules of {self.label} give {value:.3g} for {name} at {compute:.3g} FLOPs; it must lie above 0, up to "
                f"{MAX_NUMBER:g}. Use another rule or another size."
            )
        return value

    def compute_for(self, parameters: float) -> float:
        """FLOPs at which a model of N parameters is compute-optimal; the inverse of ``value("parameters")``.

        Raises:
            ConfigError: The set has no rule for the size, or one that is not a power of C alone, or the compute is
                no usable number.
        """
        size = self._rule("parameters")
        if not size.exponent or size.parameters_exponent or size.tokens_exponent:
            raise ConfigError(
                f"the rules of {self.label}: the size (parameters) must be a power of compute alone. Give its exponent, and "
                "leave out parameters_exponent and tokens_exponent."
            )
        return size.inverse(parameters)

    def setting(self, *, optimizer: str, context: int, compute: float, parameters: float, tokens: float) -> Values:
        """Every hyper-parameter at a run, within the limits of the optimizer's search ranges.

        Raises:
            ConfigError: The optimizer has no hyper-parameter of a rule's name.
        """
        rows = {name: Dimension(search=row) for name, row in known_searches(optimizer).items()}
        rules = {name: rule for name, rule in self.rules.items() if name not in ("parameters", "tokens")}
        for name in rules:
            if name not in rows:
                raise ConfigError(f"{self.label}: {unknown_name(f'hyper-parameter of {optimizer}', name, rows)}")
        return setting_at(rules, rows, context=context, compute=compute, parameters=parameters, tokens=tokens)

    def _rule(self, name: str) -> PowerRule:
        if name not in self.rules:
            able = sorted(row for row, found in RULES.items() if name in found.rules)
            raise ConfigError(
                f"the rules of {self.label} have none for {name}; they have {', '.join(self.rules)}. "
                f"Rules with {name}: {', '.join(able) or 'none'}. Use one of those, or list {name} in the campaign."
            )
        return self.rules[name]


def setting_at(
    rules: Mapping[str, PowerRule],
    rows: Mapping[str, Dimension],
    *,
    context: int,
    compute: float,
    parameters: float = 1.0,
    tokens: float = 1.0,
) -> Values:
    """The values that rules give for a run, within the limits of each hyper-parameter and rounded as trials are."""
    values = {}
    for name, rule in rules.items():
        row = rows[name]
        value = rule.value(compute=compute, parameters=parameters, tokens=tokens)
        values[name] = row.rounded(min(max(value, row.search.least), row.search.most), context)
    return values


RULES: dict[str, RuleSet] = {
    "moonlight": RuleSet(
        label="Moonlight, Table 9",
        source="arXiv:2502.16982, Appendix B, Table 9; AdamW, C = 6ND, batch in tokens",
        rules={
            "parameters": PowerRule(coefficient=0.0483359, exponent=0.5112684),
            "tokens": PowerRule(coefficient=3.4480927, exponent=0.4887316),
            "peak_lr": PowerRule(coefficient=0.0127339, exponent=-0.0574752),
            "batch_tokens": PowerRule(coefficient=0.0065202, exponent=0.4137915),
        },
    ),
    "moonlight-table-2": RuleSet(
        # The paper's small runs do not follow its own rule; these rules pass through what the runs used: within 0.2 %
        # for the rate, within 4.4 % for the batch, which was rounded by hand to multiples of 32.
        label="fits through Moonlight's Table 2",
        source="our least squares through arXiv:2502.16982, Table 2, against C = 6ND with the true N",
        rules={
            "parameters": PowerRule(coefficient=0.0483359, exponent=0.5112684),
            "tokens": PowerRule(coefficient=3.4480927, exponent=0.4887316),
            "peak_lr": PowerRule(coefficient=0.006915, exponent=-0.0447),
            "batch_tokens": PowerRule(coefficient=8.13e-5 * 8192, exponent=0.315),
        },
    ),
    "deepseek-llm": RuleSet(
        label="DeepSeek LLM",
        source="arXiv:2401.02954, equation 1; C = MD with M the non-embedding FLOPs a token",
        rules={
            "peak_lr": PowerRule(coefficient=0.3118, exponent=-0.1250),
            "batch_tokens": PowerRule(coefficient=0.2920, exponent=0.3271),
        },
    ),
    "step-law": RuleSet(
        label="Step Law",
        source="arXiv:2503.04715, equation 1; N non-embedding",
        rules={
            "peak_lr": PowerRule(coefficient=1.79, parameters_exponent=-0.713, tokens_exponent=0.307),
            "batch_tokens": PowerRule(coefficient=0.58, tokens_exponent=0.571),
        },
    ),
    "chinchilla": RuleSet(
        label="20 tokens a parameter",
        source="the usual rounding of arXiv:2203.15556, with C = 6ND",
        rules={
            "parameters": PowerRule(coefficient=120**-0.5, exponent=0.5),
            "tokens": PowerRule(coefficient=20 * 120**-0.5, exponent=0.5),
        },
    ),
}
"""Published rule sets by the name that a campaign writes; a new set is a new row."""


def rule_set(name: str) -> RuleSet:
    """A row of `RULES`, or the content of a rule file where the name ends with ``.toml``.

    Raises:
        ConfigError: There is no such row, or the file cannot be used.
    """
    if name.endswith(".toml"):
        return read_rule_file(Path(name))
    if name not in RULES:
        raise ConfigError(unknown_name("rule", name, RULES))
    return RULES[name]


def tuned_rules(tuning: Tuning, arm: str) -> RuleSet:
    """The rules that tuning fitted for an arm; raises a ConfigError if it was not tuned to the end."""
    rules = tuning.rules.get(arm)
    if not rules:
        raise ConfigError(
            f"{tuning.campaign}: there are no rules for arm {arm}; arms with rules: {', '.join(tuning.rules) or 'none'}. "
            f"Run: scaling tune {tuning.campaign}"
        )
    studies = [study for study in tuning.studies if study.arm == arm and not study.held_out]
    return RuleSet(
        label=f"{arm} of {tuning.campaign}",
        source=f"fitted to the tuned rungs of campaign {tuning.campaign}: {', '.join(s.rung for s in studies)}",
        arm=arm,
        optimizer=studies[0].optimizer,
        computes=tuple(float(study.flops) for study in studies),
        rules=rules,
    )


def write_rule_file(tuning: Tuning, arm: str, path: Path) -> Path:
    """Write the rule file of an arm (`tuned_rules`) with all digits; return its path."""
    content = msgspec.to_builtins(tuned_rules(tuning, arm))
    head = "Each rule is coefficient * C**exponent, C in FLOPs (6ND); error: standard error of the exponent."
    write_atomic(path, f"# {content['label']}. {head}\n{toml_text(content)}".encode())
    return path


def read_rule_file(path: Path) -> RuleSet:
    """The content of a rule file, read strictly.

    Raises:
        ConfigError: The file is missing, or is not a rule file.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: there is no such rule file. Write one: scaling tune CAMPAIGN.")
    return as_value(read_toml(path), RuleSet, where=str(path))
