"""Verbs on one run and its data: data, train, evaluate, export."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, subcommand

from scaling.cli.common import OnCampaign, OnRun, print_json
from scaling.errors import ExitCode


@dataclass(frozen=True)
class Prepare(OnCampaign):
    """Write the token shards of a campaign's [data]; continues an interrupted preparation."""

    def run(self) -> None:
        """Prepare the shards and print their size."""
        from scaling.units import human
        from sweeps.planning.plan import with_data

        plan = with_data(self.planned())
        manifest = plan.manifest
        assert manifest is not None
        print(
            f"{plan.data}: {human(manifest.train.tokens)} training and {human(manifest.validation.tokens)} validation "
            f"tokens, vocabulary {manifest.vocabulary:,}."
        )
        self.next_step("submit")


@dataclass(frozen=True)
class Verify(OnCampaign):
    """Check every shard of a campaign against the SHA-256 in its manifest."""

    def run(self) -> None:
        """Verify the shards."""
        from scaling.data.shards import verify

        plan = self.planned()
        verify(plan.data)
        print(f"{plan.data}: all shards match the manifest.")


@dataclass(frozen=True)
class Data:
    """Prepare or verify the token shards of a campaign."""

    verb: Annotated[Prepare, subcommand("prepare")] | Annotated[Verify, subcommand("verify")]

    def run(self) -> None:
        """Run the chosen verb."""
        self.verb.run()


@dataclass(frozen=True)
class Train(OnRun):
    """Train one submitted run on this machine, from its last checkpoint if there is one."""

    def run(self) -> None:
        """Train and print the result."""
        from scaling.training.loop import train

        record = train(self.run_dir)
        if record is None:
            print("Stopped at a checkpoint; the same command continues.")
            sys.exit(ExitCode.STOPPED)
        print(f"{record.status}, held-out loss {record.validation_loss} nats per token")


@dataclass(frozen=True)
class Evaluate(OnRun):
    """Loss and bits per byte of a finished run on its validation split or on any other text, or its scores on tasks."""

    text: str | None = None
    """A file, folder or glob of text; by default the run's validation split."""
    data: Path | None = None
    """The run's data folder, if it was moved."""
    tokens: int | None = None
    """Score at most this many tokens: a sample of the validation split, or the beginning of another text."""
    tasks: tuple[str, ...] = ()
    """Score these tasks instead, with lm-evaluation-harness (extra eval): rows of scaling.evaluation.tasks.TASKS."""
    limit: int | None = None
    """With tasks: score at most this many questions of each."""
    allow_code: bool = False
    """With tasks: let them execute the programs that the model writes, on this machine and with your rights."""
    device: str = "cpu"
    """Device for the computation: cpu, cuda, cuda:1."""
    json: bool = False
    """Print JSON with all digits."""

    def run(self) -> None:
        """Score the text and print the result."""
        if self.tasks:
            self._score_tasks()
            return
        from scaling.data.sources.registry import DataConfig
        from scaling.evaluation.loss import evaluate

        text = None if self.text is None else DataConfig(source="text", path=self.text)
        found = evaluate(self.run_dir, text, data=self.data, tokens=self.tokens, device=self.device, progress=None)
        if self.json:
            print_json(found)
        else:
            if text is None:
                print(
                    f"validation_loss in the record: {found.validation_loss:.4f} nats per token "
                    f"over {found.validation_tokens:,} tokens sampled from the validation split"
                )
            print(
                f"{found.text}: loss {found.loss:.4f} nats per token, {found.bits_per_byte:.4f} bits per byte "
                f"over {found.tokens:,} tokens (documents: {found.documents:,})"
            )

    def _score_tasks(self) -> None:
        from scaling.evaluation.tasks import downloads, score_tasks

        for download in downloads(self.tasks):
            print(f"Downloads {download}.", file=sys.stderr)
        scores = score_tasks(
            self.run_dir, self.tasks, data=self.data, limit=self.limit, device=self.device, allow_code=self.allow_code
        )
        if self.json:
            print_json(scores)
            return
        for task, metrics in scores.items():
            print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


@dataclass(frozen=True)
class Export(OnRun):
    """Export a finished run as a model for other tools: safetensors, configuration, tokenizer, model card."""

    folder: Positional[Path] = field(kw_only=True)
    """Folder for the model."""
    to: Literal["hf"] = "hf"
    """Format: hf for Hugging Face transformers."""
    data: Path | None = None
    """The run's data folder, if it was moved; it holds the tokenizer."""

    def run(self) -> None:
        """Write the model and print its files."""
        from scaling.export.huggingface import export_hf

        for file in export_hf(self.run_dir, self.folder, data=self.data):
            print(file)
