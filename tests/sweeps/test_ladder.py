"""Rungs: the paper's table to the digit, and ladders at the requested compute and optimum."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.data.sources.registry import DataConfig
from scaling.errors import UserError
from sweeps.config.campaign import ArmConfig, Campaign, LadderConfig, SharedModelConfig, TrainingConfig, load_campaign
from sweeps.config.hyperparameter_rules import RULES
from sweeps.planning.ladder import rungs_of
from sweeps.planning.plan import plan
from sweeps.reporting.plan_table import plan_rows

TABLE_2 = [
    # name, N in millions, heads, layers, width, tokens, peak LR, batch in sequences of 8192; arXiv:2502.16982, Table 2
    ("399M", 339.7, 12, 12, 1536, "8.92B", "9.503e-4", "96"),
    ("545M", 545.9, 14, 14, 1792, "14.04B", "9.143e-4", "128"),
    ("822M", 822.1, 16, 16, 2048, "20.76B", "8.825e-4", "160"),
    ("1.1B", 1146.6, 18, 18, 2304, "28.54B", "8.561e-4", "192"),
    ("1.5B", 1586.0, 20, 20, 2560, "38.91B", "8.305e-4", "256"),
]


@pytest.mark.parametrize("arm", ["adamw", "muon"])
def test_moonlight_equals_the_papers_table(arm: str, tmp_path: Path) -> None:
    rows = [row for row in plan_rows(plan(load_campaign("moonlight"), tmp_path)) if row["arm"] == arm]
    assert len(rows) == len(TABLE_2)
    for row, (name, millions, heads, layers, width, tokens, peak_lr, batch) in zip(rows, TABLE_2, strict=True):
        assert row["rung"] == name
        assert row["parameters_text"] == f"{millions}M"
        assert (row["heads"], row["layers"], row["width"]) == (heads, layers, width)
        assert row["printed"] == {"parameters": name, "tokens": tokens, "peak_lr": peak_lr, "batch": batch}
        assert row["tokens"] == round(float(tokens[:-1]) * 1e9)
        assert row["peak_lr"] == float(peak_lr)
        assert row["batch_sequences"] == int(batch)
        assert row["batch_tokens"] == int(batch) * 8192


def test_moonlight_by_law_has_the_papers_tokens() -> None:
    # Tokens agree with Table 2 to its printed digits; batch and rate of Table 9 differ from the runs', as published.
    rungs = rungs_of(load_campaign("moonlight", hyperparameters="rule"))
    assert [f"{rung.tokens / 1e9:.2f}B" for rung in rungs] == [row[5] for row in TABLE_2]
    assert [rung.batch_tokens // 8192 for rung in rungs] == [74, 109, 152, 199, 258]


def ladder(**fields: object) -> Campaign:
    return Campaign(
        file="test.toml",
        name="test",
        data=DataConfig(),
        model=SharedModelConfig(vocabulary=256, context=128, ffn_multiple=16),
        arms=(ArmConfig(name="adamw", optimizer="adamw", peak_lr=1e-3),),
        training=TrainingConfig(batch_tokens=2048),
        ladder=LadderConfig(**({"rule": "chinchilla", "head_size": 16, "width_per_layer": 32.0} | fields)),  # type: ignore[arg-type]
    )


@given(st.floats(13, 20))
def test_a_compute_optimal_rung_spends_its_compute(log_compute: float) -> None:
    compute = 10**log_compute
    (rung,) = rungs_of(ladder(computes=(compute,)))
    assert 6 * rung.parameters * rung.tokens == pytest.approx(compute, rel=1e-4)
    # The smallest models are one layer of a few heads and cannot come nearer.
    assert rung.parameters == pytest.approx(RULES["chinchilla"].value("parameters", compute=compute), rel=0.25)


def test_an_isoflop_profile_surrounds_the_optimum() -> None:
    rungs = rungs_of(ladder(kind="isoflop", computes=(1e16,), points=5, spread=4.0))
    centre = RULES["chinchilla"].value("parameters", compute=1e16)
    sizes = [rung.parameters / centre for rung in rungs]
    assert sizes == sorted(sizes)
    assert [math.log(size, 4) for size in sizes] == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=0.1)
    assert [6 * rung.parameters * rung.tokens for rung in rungs] == pytest.approx([1e16] * 5, rel=1e-4)


def test_an_unknown_kind_of_ladder_is_refused() -> None:
    with pytest.raises(UserError, match=r'\[ladder\]: kind of ladder "isoflops" is not known; did you mean "isoflop"'):
        rungs_of(ladder(kind="isoflops", computes=(1e16,)))


def test_rungs_of_the_same_model_are_refused() -> None:
    with pytest.raises(UserError, match="further apart"):
        rungs_of(ladder(sizes=(1_000_000, 1_001_000)))


@pytest.mark.parametrize("name", [name for name, row in RULES.items() if {"parameters", "tokens"} <= row.rules.keys()])
def test_a_splitting_rule_spends_all_compute(name: str) -> None:
    row = RULES[name]
    for compute in (1e17, 1e20, 1e23):
        spent = 6 * row.value("parameters", compute=compute) * row.value("tokens", compute=compute)
        assert spent == pytest.approx(compute, rel=2e-5)  # the published digits
        assert row.compute_for(row.value("parameters", compute=compute)) == pytest.approx(compute, rel=1e-9)


def test_published_rules_give_their_published_examples() -> None:
    # DeepSeek LLM, section 3.1, trains 7B on 2T tokens at a rate of 4.2e-4.
    deepseek = RULES["deepseek-llm"]
    assert deepseek.value("peak_lr", compute=6 * 7e9 * 2e12) == pytest.approx(4.2e-4, rel=0.02)
    # Moonlight, at the compute of its largest run (true N): 8.37e-4 and 258 sequences of 8192.
    moonlight = RULES["moonlight"]
    compute = 6 * 1585.97e6 * 38.91e9
    assert moonlight.value("peak_lr", compute=compute) == pytest.approx(8.37e-4, rel=1e-3)
    assert moonlight.value("batch_tokens", compute=compute) / 8192 == pytest.approx(258, rel=5e-3)
    # Step Law at 1B parameters and 100B tokens, computed by hand from its equation.
    step = RULES["step-law"]
    assert step.value("peak_lr", compute=1.0, parameters=1e9, tokens=1e11) == pytest.approx(1.63e-3, rel=0.01)
