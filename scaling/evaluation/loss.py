"""Loss and bits per byte of a finished run on its validation split, or on any text: files, a data set, another source.

The run's own `validation_loss` is the mean over a fixed sample of the validation split; asked for as many tokens as the
run evaluated, `evaluate` takes the same sample. Other text is cut into tokens by the tokenizer that the run was trained
with and scored as one stream, sequence after sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from scaling.data.batches import held_out
from scaling.data.prepare import TOKENIZER_COPY
from scaling.data.shards import manifest_hash, read_manifest
from scaling.data.sources.documents import Document
from scaling.data.sources.registry import SOURCES, DataConfig
from scaling.data.tokenizer import BYTES, Tokenizer, open_tokenizer
from scaling.errors import UserError
from scaling.io import Strict
from scaling.run.directory import RunDirectory, finished_run
from scaling.run.progress import ProgressReporter

if TYPE_CHECKING:
    import torch

    from scaling.models.decoder import Decoder


FORWARD_TOKENS = 16_384
"""Tokens of one forward pass; the mean depends on it only by rounding."""

DOCUMENTS_AT_ONCE = 64
"""Documents that are encoded together."""


class EvaluationResult(Strict, frozen=True):
    """Loss of one run on one text."""

    run: str
    text: str
    """Text that was scored: the whole validation split, a sample of it, or a path or name."""
    loss: float
    """Mean over all targets, nats per token."""
    bits_per_byte: float
    """``loss / ln 2 / bytes_per_token``, which does not depend on the tokenizer."""
    tokens: int
    """Targets that were scored."""
    validation_loss: float
    """Loss in the run's record, nats per token: measured on `validation_tokens`, and used in tables and fits."""
    validation_tokens: int
    """Tokens of the validation split that the run evaluated: a fixed sample, spread over the split."""
    bytes_per_token: float
    """Mean over the text; the token that ends each document counts, since it is predicted too."""
    documents: int
    """Documents that the targets belong to."""


def evaluate(
    run_dir: Path | str,
    text: DataConfig | None = None,
    *,
    data: Path | str | None = None,
    tokens: int | None = None,
    device: str = "cpu",
    progress: bool | None = False,
) -> EvaluationResult:
    """Score a text with the weights of a finished run.

    Args:
        run_dir: The run.
        text: Which text, by source; its tokenizer is ignored in favour of the run's. None: the run's validation split.
        data: The run's data folder, where it is no longer the one in its placement.
        tokens: Score no more than so many: of the validation split a sample, of another text its beginning. None scores
            all of it.
        device: Where to compute, in torch's words.
        progress: As in `scaling.run.progress.ProgressReporter`.

    Raises:
        UserError: The run has no weights, its data folder is gone, or the text has no token to predict.
    """
    import torch

    from scaling.models.registry import build_model
    from scaling.models.upcycle import load_weights

    directory = RunDirectory(run_dir)
    record = finished_run(directory, purpose="the evaluation")
    folder = Path(data) if data is not None else Path(directory.placement().data)
    manifest = read_manifest(folder)
    if manifest_hash(manifest) != record.manifest:
        raise UserError(
            f"data folder {folder}: its data are not those that the run was trained on, so the tokenizer may differ. "
            "Name the folder that the run was trained on with --data."
        )
    shape = record.spec.model
    assert record.validation_loss is not None  # a finished run has one
    if text is None:
        there = max(manifest.validation.tokens - 1, 0)
        held = held_out(folder, context=shape.context, tokens=min(tokens or there, there))
        counts = held.documents, held.bytes_per_token
        parts: Iterable[npt.NDArray[np.int64]] = [held.sequences]
        whole = held.sequences.shape[0] == there // shape.context
        where = f"{'whole' if whole else 'sample of the'} validation split of {folder.name}"
    else:
        tokenizer = open_tokenizer(BYTES if manifest.tokenizer.name == BYTES else str(folder / TOKENIZER_COPY))
        stream = _Stream(SOURCES[text.source].documents(text), tokenizer, shape.context, tokens)
        parts, where = stream, text.path or text.name or text.source
    model = build_model(shape)
    load_weights(model, directory.intact_weights(record), method="copy")
    model.to(torch.device(device))
    known = held.sequences.size - len(held.sequences) if text is None else tokens
    with ProgressReporter(f"{where}: scoring", total=known, unit="tokens", bar=progress) as reporter:
        total, scored = _score(model, parts, max(1, FORWARD_TOKENS // shape.context), torch.device(device), reporter)
    if text is not None:
        counts = stream.documents, stream.bytes / max(stream.tokens, 1)
    if not scored:
        raise UserError(f"{where}: the text is empty. Name a source with at least one document.")
    loss = total / scored
    return EvaluationResult(
        run=directory.path.name,
        text=where,
        loss=loss,
        bits_per_byte=loss / math.log(2) / counts[1],
        tokens=scored,
        validation_loss=record.validation_loss,
        validation_tokens=record.spec.evaluation.tokens // shape.context * shape.context,
        bytes_per_token=counts[1],
        documents=counts[0],
    )


class _Stream:
    """Documents as sequences of `context` inputs, inputs and targets overlapping by one; the last may be shorter."""

    def __init__(self, documents: Iterator[Document], tokenizer: Tokenizer, context: int, tokens: int | None) -> None:
        self.source, self.tokenizer, self.context = documents, tokenizer, context
        self.limit = math.inf if tokens is None else tokens + 1
        self.documents = self.bytes = self.tokens = 0

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """Shape ``(1, inputs + 1)``, int64."""
        rest = np.empty(0, dtype=np.int64)
        for ids in self._ids():
            rest = np.concatenate([rest, ids])
            while len(rest) > self.context:
                yield rest[None, : self.context + 1]
                rest = rest[self.context :]
        if len(rest) > 1:
            yield rest[None]

    def _ids(self) -> Iterator[npt.NDArray[np.int64]]:
        while texts := [document.text for document in itertools.islice(self.source, DOCUMENTS_AT_ONCE)]:
            for text, ids in zip(texts, self.tokenizer.encode(texts), strict=True):
                if self.tokens >= self.limit:
                    return
                kept = ids[: int(min(len(ids), self.limit - self.tokens))].astype(np.int64)
                self.documents += 1
                # Of a document that is cut, the same share of bytes counts as of tokens.
                self.bytes += round(len(text.encode()) * len(kept) / len(ids))
                self.tokens += len(kept)
                yield kept


def _score(
    model: Decoder,
    parts: Iterable[npt.NDArray[np.int64]],
    at_once: int,
    device: torch.device,
    reporter: ProgressReporter,
) -> tuple[float, int]:
    """Sum of losses and number of targets."""
    import torch

    total, scored = 0.0, 0
    model.eval()
    with torch.no_grad():
        for _, alike in itertools.groupby(itertools.chain.from_iterable(parts), key=len):
            while batch := list(itertools.islice(alike, at_once)):
                sequences = torch.from_numpy(np.stack(batch)).to(device)
                targets = sequences.shape[0] * (sequences.shape[1] - 1)
                total += float(model.loss(sequences)) * targets
                scored += targets
                reporter.update(scored)
    return total, scored
