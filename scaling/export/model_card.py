"""A model card written from a run's record: what the weights are, and nothing that the record does not say."""

from __future__ import annotations

import math

import msgspec

from scaling.optim.registry import OPTIMIZERS
from scaling.run.record import RunRecord
from scaling.units import human


def model_card(record: RunRecord, run: str, *, has_tokenizer: bool) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        record: Record of a finished run.
        run: Id of the run.
        has_tokenizer: True if the folder has a tokenizer.
    """
    spec, shape = record.spec, record.spec.model
    options = ", ".join(f"{name} = {value}" for name, value in sorted(spec.optimizer.options.items()))
    optimizer = OPTIMIZERS.row(spec.optimizer.name).label
    matrices = human(record.parameters["blocks"])
    rows = {
        "Run": f"`{run}`",
        "Model": f"{shape.family}: {shape.layers} layers, width {shape.width}, {shape.heads} heads, "
        f"feed-forward {shape.ffn_width}, context {shape.context}, vocabulary {shape.vocabulary:,}, "
        f"{'tied' if shape.tied else 'untied'} embeddings",
        "Parameters": f"{record.parameters['total']:,}, of which {record.parameters['blocks']:,} in the blocks' matrices",
        "Training tokens": f"{record.tokens:,} in batches of {spec.batch_tokens:,}",
        "Training FLOPs": ", ".join(f"{flops:.4g} (`{name}`)" for name, flops in record.flops.items()),
        "Optimizer": f"{optimizer}, peak learning rate {spec.optimizer.peak_lr:g}, "
        f"weight decay {spec.optimizer.weight_decay:g}{', ' if options else ''}{options}",
        "Schedule": ", ".join(f"{name} {value}" for name, value in msgspec.to_builtins(spec.schedule).items() if value),
        "Seed, precision": f"{spec.seed}, {spec.precision}",
        "Data": f"{spec.data.source}, manifest `{record.manifest[:16]}`",
        "Held-out loss": _loss(record),
        "Trained on": f"{record.device.count} x {record.device.name}, {record.seconds:,.0f} s",
        "Code": f"commit {record.code.commit or 'unknown'}{' with uncommitted changes' if record.code.dirty else ''}; "
        + ", ".join(f"{name} {version}" for name, version in record.code.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    loading = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    if has_tokenizer:
        loading += 'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
    tokenizer = (
        ""
        if has_tokenizer
        else "\nThere is no tokenizer in this folder: the data that the run was trained on were not at hand when it was "
        "exported. Export again with the data folder named.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- scaling-laws
- {spec.optimizer.name}
---

# {matrices} {shape.family}, {optimizer}, {human(record.tokens)} tokens

One run of a scaling-law experiment that compares ways of training at equal loss. It is a measuring point and not an
assistant: it was trained on few tokens, to predict the next one, and was neither tuned to follow instructions nor checked
for harmful output. No licence is stated here; the text it was trained on keeps its own.

| | |
|---|---|
{table}

Bits per byte do not depend on the tokenizer; the loss per token does.
{tokenizer}
```python
{loading}model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""


def _loss(record: RunRecord) -> str:
    if record.validation_loss is None:
        return "not measured"
    text = f"{record.validation_loss:.4f} nats per token"
    if record.bytes_per_token:
        text += f", {record.validation_loss / math.log(2) / record.bytes_per_token:.4f} bits per byte"
    return f"{text}, over {record.spec.evaluation.tokens:,} tokens"
