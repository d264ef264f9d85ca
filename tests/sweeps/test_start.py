"""Campaign files written for this machine, files that extend others, and the origins of values."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from sweeps.config.campaign import built_in, campaign_path, campaign_tables, load_campaign
from sweeps.planning.explain import explain, explain_field
from sweeps.planning.plan import plan
from sweeps.planning.starter import write_starter


@pytest.mark.parametrize("template", built_in())
def test_a_new_campaign_can_be_planned_and_is_never_overwritten(template: str, tmp_path: Path) -> None:
    file, schema = write_starter(tmp_path / "mine.toml", template=template)
    assert plan(load_campaign(file), tmp_path).campaign.name == "mine"
    assert file.read_text().startswith(f"#:schema {schema.name}\n")
    with pytest.raises(UserError, match="another NAME"):
        write_starter(file, template=template)


def test_short_text_is_repeated_and_evaluated_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("All happy families are alike. " * 400)
    file, _ = write_starter(tmp_path / "mine.toml", template="quick", data=str(tmp_path / "book.txt"))
    campaign = load_campaign(file)
    assert plan(campaign, tmp_path).runs
    assert (campaign.data.repeat, campaign.evaluation.tokens) == (True, 512)
    (tmp_path / "word.txt").write_text("short")
    with pytest.raises(UserError, match="too few to hold out"):
        write_starter(tmp_path / "short.toml", template="quick", data=str(tmp_path / "word.txt"))
    assert not (tmp_path / "short.toml").exists()


def test_a_campaign_changes_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(campaign_path("quick").read_text())
    arms = '[[arms]]\nname = "muon"\npeak_lr = 1e-3\n[[arms]]\nname = "second"\noptimizer = "muon"\npeak_lr = 2e-2\n'
    (tmp_path / "child.toml").write_text(
        f'extends = "base.toml"\nname = "child"\nseeds = [7]\n{arms}[training]\nweight_decay = 0.2\n'
    )
    child, quick = load_campaign(tmp_path / "child.toml"), load_campaign("quick")
    assert [arm.name for arm in child.arms] == ["adamw", "muon", "second"]
    assert (child.arms[1].optimizer, child.arms[1].peak_lr, child.seeds) == ("muon", 1e-3, (7,))
    assert (child.training.weight_decay, child.training.batch_tokens) == (0.2, quick.training.batch_tokens)
    assert child.rungs == quick.rungs
    (tmp_path / "base.toml").write_text('extends = "child.toml"\n')
    with pytest.raises(UserError, match="back to itself"):
        load_campaign(tmp_path / "child.toml")


def test_an_extended_file_has_the_identity_of_the_same_tables_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "child.toml").write_text('extends = "quick"\n')
    assert load_campaign(tmp_path / "child.toml").identity == load_campaign("quick").identity


@pytest.mark.parametrize(
    ("change", "field"),
    [("peak_lr = { \"21k\" = 4e-2", "optimizer.peak_lr"), ("warmup = 0.05", "schedule.warmup_tokens"),
     ("width = 24", "model.width"), ("tokens_per_parameter = 20", "budget.tokens"), ("threads = 1", "placement.threads"),
     ("weight_decay = 0.1", "optimizer.weight_decay"), ("times = 2", "evaluation.times"), ("vocabulary = 256", "model.vocabulary")],
)  # fmt: skip
def test_the_line_of_a_value_is_the_one_that_changes_it(change: str, field: str, tmp_path: Path) -> None:
    text = campaign_path("quick").read_text()
    values = []
    for number, content in enumerate((text, text.replace(change, f"{change.rpartition('= ')[0]}= {_doubled(change)}"))):
        (file := tmp_path / f"{number}.toml").write_text(content)
        made = plan(load_campaign(file), tmp_path)
        run = next(run for run in made.runs if run.arm == "muon")
        (found,) = explain_field(explain(made, run, str(file)), field)
        values.append(found.value)
        line = text[: text.index(change)].count("\n") + 1
        assert found.origin.endswith(f"{file.name}:{line}")
    assert values[0] != values[1]


def _doubled(change: str) -> str:
    value = float(change.rpartition("= ")[2])
    return f"{2 * value:g}"


def test_defaults_are_named_and_unknown_fields_refused(tmp_path: Path) -> None:
    made = plan(load_campaign("quick"), tmp_path)
    origins = explain(made, made.runs[0], "quick")
    assert {origin.origin for origin in explain_field(origins, "options")} == {"default"}
    with pytest.raises(UserError, match=r'did you mean "optimizer\.peak_lr"'):
        explain_field(origins, "optimizer.peak_lrr")


def test_resolved_tables_make_the_same_campaign(tmp_path: Path) -> None:
    tables: dict[str, Any] = campaign_tables(campaign_path("quick"), settings=["seeds=[3]"])
    assert tables["seeds"] == [3]
    assert tomllib.loads(re.sub(r"(?m)^seeds = \[0\]$", "seeds = [3]", campaign_path("quick").read_text())) == tables
