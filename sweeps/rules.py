"""Published rules for hyper-parameters: learning rate, batch and tokens as power laws of compute, size and data.

A rule is data, one row each in `RULES`, with its source. It was fitted on somebody's models and somebody's text; that it
holds for others is assumed, and a plan that uses one says which. To add a rule, add a row.
"""

from __future__ import annotations

import math
from pathlib import Path

from scaling.errors import Refusal, unknown_name
from scaling.spec import Strict


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
            Refusal: It is too large for a number.
        """
        try:
            value = self.coefficient * compute**self.compute * parameters**self.parameters * tokens**self.tokens
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise Refusal(
                f"a rule gives no finite value at {compute:.3g} FLOPs, {parameters:.3g} parameters and {tokens:.3g} tokens. "
                "Use another rule or another size."
            )
        return float(value)


class Rule(Strict, frozen=True):
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
            Refusal: The rule has no law for the size.
        """
        return self._sizes().at(compute=compute, parameters=1.0, tokens=1.0)

    def compute_for(self, parameters: float) -> float:
        """FLOPs at which a model of N parameters is compute-optimal; the inverse of `optimal_parameters`.

        Raises:
            Refusal: The rule has no law for the size.
        """
        law = self._sizes()
        return float((parameters / law.coefficient) ** (1 / law.compute))

    def optimal_tokens(self, compute: float) -> float:
        """D that the rule spends `compute` FLOPs on.

        Raises:
            Refusal: The rule has no law for the data.
        """
        if self.tokens is None:
            raise self._lacks("how many tokens to train on")
        return self.tokens.at(compute=compute, parameters=1.0, tokens=1.0)

    def _sizes(self) -> Power:
        if self.parameters is None:
            raise self._lacks("how large a model to train")
        return self.parameters

    def _lacks(self, what: str) -> Refusal:
        able = [name for name, rule in RULES.items() if rule.parameters and rule.tokens]
        return Refusal(f"{self.label} does not say {what}; rules that do: {', '.join(sorted(able))}.")


RULES: dict[str, Rule] = {
    "moonlight": Rule(
        label="Moonlight, Table 9",
        source="arXiv:2502.16982, Appendix B, Table 9; AdamW, C = 6ND, batch in tokens",
        parameters=Power(coefficient=0.0483359, compute=0.5112684),
        tokens=Power(coefficient=3.4480927, compute=0.4887316),
        peak_lr=Power(coefficient=0.0127339, compute=-0.0574752),
        batch_tokens=Power(coefficient=0.0065202, compute=0.4137915),
    ),
    "moonlight-table-2": Rule(
        # The paper's runs do not follow its own law for the small sizes; these pass through what the runs used:
        # within 0.2 % for the rate, within 4.4 % for the batch, which was rounded by hand to multiples of 32.
        label="fits through Moonlight's Table 2",
        source="our least squares through arXiv:2502.16982, Table 2, against C = 6ND with the true N",
        parameters=Power(coefficient=0.0483359, compute=0.5112684),
        tokens=Power(coefficient=3.4480927, compute=0.4887316),
        peak_lr=Power(coefficient=0.006915, compute=-0.0447),
        batch_tokens=Power(coefficient=8.13e-5 * 8192, compute=0.315),
    ),
    "deepseek-llm": Rule(
        label="DeepSeek LLM",
        source="arXiv:2401.02954, equation 1; C = MD with M the non-embedding FLOPs a token",
        peak_lr=Power(coefficient=0.3118, compute=-0.1250),
        batch_tokens=Power(coefficient=0.2920, compute=0.3271),
    ),
    "step-law": Rule(
        label="Step Law",
        source="arXiv:2503.04715, equation 1; N non-embedding",
        peak_lr=Power(coefficient=1.79, parameters=-0.713, tokens=0.307),
        batch_tokens=Power(coefficient=0.58, tokens=0.571),
    ),
    "chinchilla": Rule(
        label="20 tokens a parameter",
        source="the usual rounding of arXiv:2203.15556, with C = 6ND",
        parameters=Power(coefficient=120**-0.5, compute=0.5),
        tokens=Power(coefficient=20 * 120**-0.5, compute=0.5),
    ),
}


def rule(name: str) -> Rule:
    """The row of a rule, or what a rule file says (`sweeps.tuning.rulefile`), which is named by its path.

    Raises:
        Refusal: There is none of that name, or the file cannot be used.
    """
    if name.endswith(".toml"):
        from sweeps.tuning.rulefile import read_rule_file

        return read_rule_file(Path(name)).rule()
    if name not in RULES:
        raise Refusal(unknown_name("rule", name, RULES))
    return RULES[name]
