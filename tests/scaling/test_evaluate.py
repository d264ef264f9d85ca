"""The number that a text gets is the number that the run measured itself, and does not depend on how it is cut."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from running import finish, place
from safetensors.torch import load_file
from tiny import make_spec

from scaling.data.prepare import prepare
from scaling.data.shards import manifest_hash, read_manifest
from scaling.data.sources.registry import DataConfig
from scaling.errors import UserError
from scaling.evaluation.loss import evaluate
from scaling.export.huggingface import export_hf
from scaling.models.registry import build_model
from scaling.run.directory import RunDirectory
from scaling.spec import WarmStart
from scaling.training.loop import train


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = manifest_hash(read_manifest(tiny_shards))
    path = place(make_spec(steps=30, manifest=manifest), tmp_path_factory.mktemp("runs"), tiny_shards)
    finish(path)
    return path


def test_as_many_tokens_as_the_run_evaluated_give_the_loss_in_its_record(run: Path) -> None:
    record = RunDirectory(run).record()
    assert record is not None
    result = evaluate(run, tokens=record.spec.evaluation.tokens)
    assert result.loss == pytest.approx(record.validation_loss, abs=1e-6)
    assert result.validation_loss == record.validation_loss
    assert result.bytes_per_token == record.bytes_per_token
    assert result.tokens == result.validation_tokens == record.spec.evaluation.tokens
    assert result.text.startswith("sample of the validation split")
    whole = evaluate(run)
    assert whole.text.startswith("whole validation split")
    assert whole.tokens > result.tokens


def test_the_validation_loss_samples_a_split_whose_first_documents_differ(tiny_text: Path, tmp_path: Path) -> None:
    foreign = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n" * 60
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "0.txt").write_text(foreign)
    for number, file in enumerate(sorted(tiny_text.iterdir())[:10], start=1):
        (tmp_path / "held" / f"{number}.txt").write_text(file.read_text())
    manifest = prepare(
        DataConfig(source="text", path=str(tiny_text), validation=str(tmp_path / "held")),
        tmp_path / "shards",
        progress=False,
    )
    run = place(make_spec(steps=30, manifest=manifest_hash(manifest)), tmp_path / "runs", tmp_path / "shards")
    finish(run)
    whole = evaluate(run)
    beginning = evaluate(run, DataConfig(source="text", path=str(tmp_path / "held" / "0.txt")))
    assert abs(whole.validation_loss - whole.loss) < 0.2 * abs(beginning.loss - whole.loss)
    assert whole.validation_tokens < len(foreign)  # so the first tokens of the split would all be foreign


def test_a_text_is_scored_token_by_token_up_to_its_last(run: Path, tmp_path: Path) -> None:
    texts = ["7 plus 3 is 10, and so on.\n", "é and 5 plus"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    result = evaluate(run, DataConfig(source="text", path=str(tmp_path)))
    # By hand: one stream of bytes with a zero after each document, sequences of 16 inputs.
    record = RunDirectory(run).record()
    assert record is not None
    model = build_model(record.spec.model)
    model.load_state_dict(load_file(run / "weights.safetensors"))
    stream = torch.tensor(list(b"".join(text.encode() + b"\0" for text in texts)))
    losses = []
    for start in range(0, len(stream) - 1, 16):
        sequence = stream[start : start + 17]
        with torch.no_grad():
            losses += F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:], reduction="none").tolist()
    assert len(losses) == len(stream) - 1 == result.tokens
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    in_bytes = sum(len(text.encode()) for text in texts)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * len(stream) / in_bytes)
    assert result.documents == 2


def test_a_limit_scores_the_beginning(run: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("1 plus 1 is 2, and so on.\n" * 50)
    config = DataConfig(source="text", path=str(tmp_path))
    limited = evaluate(run, config, tokens=100)
    assert limited.tokens == 100
    assert limited.bytes_per_token == pytest.approx(1.0, abs=0.02)
    assert evaluate(run, config).tokens == 26 * 50


def test_unlike_text_is_harder_than_the_text_it_learned(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20)
    other = evaluate(run, DataConfig(source="text", path=str(tmp_path)))
    assert other.bits_per_byte > evaluate(run).bits_per_byte + 1


def test_runs_that_cannot_be_scored_are_refused(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such directory"):
        evaluate(tmp_path / "nowhere")
    unfinished = place(make_spec(seed=5, manifest=manifest_hash(read_manifest(tiny_shards))), tmp_path, tiny_shards)
    with pytest.raises(UserError, match="its state is planned"):
        evaluate(unfinished)
    with pytest.raises(UserError, match="holds no manifest"):
        evaluate(run, data=tmp_path)


def test_damaged_weights_are_refused_by_every_reader(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    directory = RunDirectory(run)
    content = directory.weights_file.read_bytes()
    record = directory.record()
    assert record is not None
    child = msgspec.structs.replace(record.spec, seed=1, warm_start=WarmStart(run=run.name))
    path = place(child, run.parent, tiny_shards)
    directory.weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        for read in (evaluate, lambda run: export_hf(run, tmp_path / "export"), lambda _: train(path, progress=False)):
            with pytest.raises(UserError, match=r"weights.safetensors: its SHA-256 is .* and the record says"):
                read(run)
    finally:
        directory.weights_file.write_bytes(content)
    assert finish(path).initial_flops == record.flops
