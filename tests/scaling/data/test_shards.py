import msgspec
import numpy as np
import pytest

from scaling.data.batches import held_out
from scaling.data.prepare import prepare
from scaling.data.shards import (
    DOCUMENT_ENDS,
    HEADER_BYTES,
    MANIFEST,
    TokenStream,
    document_ends,
    manifest_hash,
    open_shard,
    read_manifest,
    verify,
)
from scaling.data.sources.documents import content_digest
from scaling.data.sources.registry import DataConfig
from scaling.errors import UserError

TEXTS = [f"Zeile {number}: größer, 大きい\n" * (1 + number % 7) for number in range(60)]


@pytest.fixture
def folder(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number, content in enumerate(TEXTS):
        (text / f"{number:02d}.txt").write_text(content, encoding="utf-8")
    prepare(DataConfig(source="text", path=str(text), validation_fraction=0.2), tmp_path / "shards", progress=False)
    return tmp_path / "shards"


def documents_of(folder, split):
    stream = TokenStream(folder, split)
    tokens = np.empty(len(stream), dtype=np.int64)
    stream.read_into(tokens, 0)
    return bytes(tokens.astype(np.uint8)).decode().split("\0")[:-1]


def test_shards_round_trip(folder):
    assert sorted(documents_of(folder, "train") + documents_of(folder, "validation")) == sorted(TEXTS)


def test_manifest_counts(folder):
    manifest = read_manifest(folder)
    assert manifest.train.documents + manifest.validation.documents == len(TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert manifest.train.bytes + manifest.validation.bytes == size
    assert manifest.train.tokens + manifest.validation.tokens == size + len(TEXTS)


def test_header_layout(folder):
    shard = folder / read_manifest(folder).train.shards[0].file
    values = np.fromfile(shard, dtype="<i4", count=256)
    assert list(values[:3]) == [20240520, 1, read_manifest(folder).train.tokens]
    assert not values[3:].any()


def test_manifest_hash_depends_only_on_content(folder, tmp_path):
    manifest = read_manifest(folder)
    before = manifest_hash(folder)
    elsewhere = folder.rename(tmp_path / "moved")
    assert manifest_hash(elsewhere) == before
    renamed = msgspec.structs.replace(manifest, source="hf", options={"path": "/else/where"}, config_hash="")
    assert manifest_hash(renamed) == before
    shard = msgspec.structs.replace(manifest.train.shards[0], sha256="0" * 64)
    train = msgspec.structs.replace(manifest.train, shards=(shard,))
    assert manifest_hash(msgspec.structs.replace(manifest, train=train)) != before


def test_reading_past_the_end_of_the_stream_is_an_error(folder):
    stream = TokenStream(folder)
    with pytest.raises(IndexError):
        stream.read_into(np.empty(2, dtype=np.int64), len(stream) - 1)


def spoil(path, change):
    content = bytearray(path.read_bytes())
    content = change(content) or content
    path.write_bytes(bytes(content))


def flip(content, at):
    content[at] ^= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content[:-2], "it was cut short"),
        (lambda content: content[:100], "not a token shard"),
        (lambda content: flip(content, 0), "not a token shard"),
        (lambda content: flip(content, 4), "version 0"),
        (lambda content: content[:8] + b"\1\0\0\0" + content[12 : HEADER_BYTES + 2], "manifest says"),
    ],
    ids=["truncated", "torn header", "foreign", "other version", "other shard"],
)
def test_a_damaged_shard_is_rejected_when_opened(folder, change, sentence):
    shard = read_manifest(folder).train.shards[0]
    spoil(folder / shard.file, change)
    with pytest.raises(UserError, match=sentence) as error:
        TokenStream(folder)
    assert shard.file in str(error.value)
    assert "prepare the data again" in str(error.value)


def test_verify_finds_a_changed_token(folder):
    verify(folder)
    shard = read_manifest(folder).validation.shards[0]
    spoil(folder / shard.file, lambda content: flip(content, HEADER_BYTES + 3))
    open_shard(folder / shard.file, shard.tokens)
    with pytest.raises(UserError, match="content has changed"):
        verify(folder)


def test_damaged_document_ends_are_rejected(folder):
    assert document_ends(folder)[-1].tolist() == [
        read_manifest(folder).validation.tokens,
        read_manifest(folder).validation.bytes,
    ]
    spoil(folder / DOCUMENT_ENDS, lambda content: flip(content, 3))
    with pytest.raises(UserError, match="content has changed"):
        verify(folder)
    spoil(folder / DOCUMENT_ENDS, lambda content: content[:-1])
    with pytest.raises(UserError, match=r"documents\.bin: holds .* bytes"):
        held_out(folder, context=4, tokens=8)
    (folder / DOCUMENT_ENDS).unlink()
    with pytest.raises(UserError, match=r"documents\.bin: cannot be read"):
        verify(folder)


def test_a_missing_shard_is_rejected(folder):
    (folder / read_manifest(folder).train.shards[0].file).unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin: cannot be read"):
        TokenStream(folder)


def test_a_folder_without_a_manifest_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*scaling data prepare"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"source": 1}')
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(tmp_path)


def test_no_validation_document_is_in_training(folder):
    train, validation = (
        {content_digest(text) for text in documents_of(folder, split)} for split in ("train", "validation")
    )
    assert validation
    assert not train & validation
