"""Model card written from a run's record. It states nothing that the record does not hold."""

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
        has_tokenizer: Whether a tokenizer is exported beside the card.
    """
    import jinja2

    spec, shape, loss = record.spec, record.spec.model, record.validation_loss
    assert loss is not None  # a finished run has one
    optimizer = OPTIMIZERS.row(spec.optimizer.name).label
    options = ", ".join(f"{name} = {value}" for name, value in sorted(spec.optimizer.options.items()))
    rows = {
        "Run": f"`{run}`",
        "Model": f"{shape.family}: {shape.layers} layers, width {shape.width}, {shape.heads} heads, "
        f"feed-forward {shape.ffn_width}, context {shape.context}, vocabulary {shape.vocabulary:,}, "
        f"{'tied' if shape.tied else 'untied'} embeddings",
        "Parameters": f"{record.parameters['total']:,}, of which {record.parameters['blocks']:,} in the matrices of the blocks",
        "Training tokens": f"{record.tokens:,} in batches of {spec.batch_tokens:,}",
        "Training FLOPs": ", ".join(f"{flops:.4g} (`{name}`)" for name, flops in record.flops.items()),
        "Optimizer": f"{optimizer}, peak learning rate {spec.optimizer.peak_lr:g}, "
        f"weight decay {spec.optimizer.weight_decay:g}{', ' if options else ''}{options}",
        "Schedule": ", ".join(f"{name} {value}" for name, value in msgspec.to_builtins(spec.schedule).items() if value),
        "Seed, precision": f"{spec.seed}, {spec.precision}",
        "Data": f"{spec.data.source}, manifest `{record.manifest[:16]}`",
        "Held-out loss": f"{loss:.4f} nats per token, {loss / math.log(2) / record.bytes_per_token:.4f} bits per byte, "
        f"over {spec.evaluation.tokens:,} tokens",
        "Trained on": f"{record.device.count} x {record.device.name}, {record.seconds:,.0f} s",
        "Code": f"commit {record.code.commit or 'unknown'}{' with uncommitted changes' if record.code.dirty else ''}; "
        + ", ".join(f"{name} {version}" for name, version in record.code.versions.items()),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scaling.export"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        optimizer=spec.optimizer.name,
        title=f"{human(record.parameters['blocks'])} {shape.family}, {optimizer}, {human(record.tokens)} tokens",
        rows=rows,
        has_tokenizer=has_tokenizer,
    )
