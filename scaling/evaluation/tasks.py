"""Scores of a finished run on the tasks that papers report, by EleutherAI's lm-evaluation-harness (extra ``eval``).

The run is exported for transformers into a temporary folder, which the harness loads. The harness downloads data sets;
`downloads` lists them beforehand, and this module itself does not use the network.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaling.errors import UserError, unknown_name
from scaling.io import Strict


class DownstreamTask(Strict, frozen=True):
    """One row of `TASKS`."""

    name: str
    """Name in the harness."""
    dataset: str
    """Data set on the Hugging Face Hub that is downloaded, as of version 0.4 of the harness."""
    shots: int | None = None
    """Worked examples in the prompt; None takes the harness's own number."""
    runs_code: bool = False
    """True if scoring executes the programs that the model writes."""


TASKS: dict[str, DownstreamTask] = {
    "mmlu": DownstreamTask(name="mmlu", dataset="cais/mmlu", shots=5),
    "mmlu-pro": DownstreamTask(name="mmlu_pro", dataset="TIGER-Lab/MMLU-Pro"),
    "bbh": DownstreamTask(name="bbh_cot_fewshot", dataset="SaylorTwift/bbh"),
    "triviaqa": DownstreamTask(name="triviaqa", dataset="trivia_qa", shots=5),
    "gsm8k": DownstreamTask(name="gsm8k", dataset="openai/gsm8k"),
    "math": DownstreamTask(name="minerva_math", dataset="EleutherAI/hendrycks_math"),
    "humaneval": DownstreamTask(name="humaneval", dataset="openai/openai_humaneval", runs_code=True),
    "mbpp": DownstreamTask(name="mbpp", dataset="google-research-datasets/mbpp", runs_code=True),
}
"""Tasks that Moonlight reports and the harness has."""


def downloads(tasks: Iterable[str]) -> list[str]:
    """The downloads of these tasks, one sentence each."""
    return [f"{name}: the data set {_task(name).dataset} from the Hugging Face Hub" for name in tasks]


def score_tasks(
    run_dir: Path | str,
    tasks: Iterable[str],
    *,
    data: Path | str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    allow_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Scores by task and metric.

    Args:
        run_dir: A finished run.
        tasks: Rows of `TASKS`.
        data: The run's data folder, if it has moved since the run; the tokenizer comes from it.
        limit: Most questions of each task.
        device: Device to compute on, as torch names it.
        allow_code: Let tasks run the programs that the model writes, on this machine and as you.

    Raises:
        UserError: A task is not known or runs code that is not allowed, a package is missing, or the run cannot be
            exported.
    """
    from scaling.export.huggingface import export_hf

    rows = {name: _task(name) for name in tasks}
    unsafe = [name for name, row in rows.items() if row.runs_code]
    if unsafe and not allow_code:
        raise UserError(
            f"{', '.join(unsafe)}: scoring runs the programs that the model writes, on this machine and with your rights. "
            "Leave it out, or allow it with --allow-code where that is harmless, as in a container."
        )
    harness = _harness()
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder) / "model"
        written = export_hf(run_dir, hub, data=data)
        if not any(file.name == "tokenizer.json" for file in written):
            raise UserError(
                f"run {run_dir}: its data folder is gone, and the tokenizer with it. Name the folder with --data."
            )
        for name, row in rows.items():
            answer = harness.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(hub), "tokenizer": str(hub)},
                tasks=[row.name],
                num_fewshot=row.shots,
                limit=limit,
                device=device,
                confirm_run_unsafe_code=row.runs_code,
            )
            found = answer["results"][row.name]
            scores[name] = {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
    return scores


def _task(name: str) -> DownstreamTask:
    if name not in TASKS:
        raise UserError(unknown_name("task", name, TASKS))
    return TASKS[name]


def _harness() -> Any:
    try:
        importlib.import_module("transformers")
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f"scoring tasks needs the packages transformers and lm_eval, and one cannot be imported ({error}). "
            "Install the extra: pip install 'scaling-harness[eval]'."
        ) from None
