"""Tasks: the harness gets the exported run with the usual shots, and runs code only where that is allowed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from running import finish, place
from tiny import make_spec

from scaling.cli.runs import Evaluate
from scaling.data.shards import manifest_hash
from scaling.errors import UserError
from scaling.evaluation.tasks import TASKS, downloads, score_tasks


@pytest.fixture
def run(tiny_shards: Path, tmp_path: Path) -> Path:
    path = place(make_spec(steps=2, manifest=manifest_hash(tiny_shards)), tmp_path / "runs", tiny_shards)
    finish(path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the harness that looks at the model it is given."""
    seen: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        folder = Path(arguments["model_args"]["pretrained"])
        seen.append(arguments | {"config": json.loads((folder / "config.json").read_text())})
        assert (folder / "tokenizer.json").exists()
        return {"results": {arguments["tasks"][0]: {"acc,none": 0.25, "alias": "name", "acc_stderr,none": 0.01}}}

    module = types.ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    return seen


def test_the_exported_run_is_scored_with_the_usual_shots(run: Path, calls: list[dict[str, Any]]) -> None:
    assert score_tasks(run, ["mmlu", "gsm8k"], limit=3) == {
        name: {"acc,none": 0.25, "acc_stderr,none": 0.01} for name in ("mmlu", "gsm8k")
    }
    assert [(call["tasks"], call["num_fewshot"], call["limit"]) for call in calls] == [
        (["mmlu"], 5, 3),
        (["gsm8k"], None, 3),
    ]
    assert calls[0]["config"]["architectures"] == ["LlamaForCausalLM"]


def test_programs_of_the_model_run_only_where_allowed(run: Path, calls: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="humaneval: scoring runs the programs"):
        score_tasks(run, ["mmlu", "humaneval"])
    assert calls == []
    score_tasks(run, ["humaneval"], allow_code=True)
    assert calls[0]["confirm_run_unsafe_code"] is True


def test_downloads_are_named_before_anything_is_fetched() -> None:
    assert downloads(["gsm8k"]) == ["gsm8k: the data set openai/gsm8k from the Hugging Face Hub"]
    assert len(downloads(TASKS)) == len(TASKS)
    with pytest.raises(UserError, match='did you mean "gsm8k"'):
        downloads(["gsm8"])


def test_a_missing_package_is_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'scaling-harness\[eval\]'"):
        score_tasks(run, ["mmlu"])


def test_the_verb_prints_downloads_and_scores(
    run: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    Evaluate(named=run, tasks=("mmlu",), limit=3).run()
    printed = capsys.readouterr()
    assert "Downloads mmlu: the data set cais/mmlu" in printed.err
    assert "mmlu: acc,none 0.2500" in printed.out
