import dataclasses
import json
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

import scaling.data.prepare as preparation
import scaling.data.writer
from scaling.data.prepare import PROGRESS, at_most, default_folder, prepare, prepared
from scaling.data.shards import MANIFEST, TokenStream, document_ends
from scaling.data.sources.documents import Document
from scaling.data.sources.registry import DataConfig
from scaling.errors import UserError

SMALL = {"SHARD_TOKENS": 3000, "CHECKPOINT_SECONDS": 0.0, "BATCH_BYTES": 500}
"""Several shards, and a checkpoint every few documents, from a text of 30 kB."""

CHILD = """
import os, signal, sys, time
from pathlib import Path
import scaling.data.prepare as preparation, scaling.data.writer as writer
from scaling.data.sources.registry import DataConfig

text, folder, action = sys.argv[1:]
writer.SHARD_TOKENS, preparation.CHECKPOINT_SECONDS, preparation.BATCH_BYTES = {SHARD_TOKENS}, {CHECKPOINT_SECONDS}, {BATCH_BYTES}
calls = 0
add, write_json = writer.ShardWriter.add, preparation.write_json

def counted_add(self, ids, size):
    global calls
    calls += 1
    add(self, ids, size)
    if action == str(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "slowly":
        time.sleep(0.01)

def killed_before_manifest(path, value):
    if action == "manifest" and path.name == "manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, value)

writer.ShardWriter.add, preparation.write_json = counted_add, killed_before_manifest
preparation.prepare(DataConfig(source="text", path=text), Path(folder))
print(calls)
""".format(**SMALL)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03d}.txt").write_text(f"line of file {number}\n" * (5 + number % 20))
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scaling.data.writer, "SHARD_TOKENS", SMALL["SHARD_TOKENS"])
    monkeypatch.setattr(preparation, "CHECKPOINT_SECONDS", SMALL["CHECKPOINT_SECONDS"])
    monkeypatch.setattr(preparation, "BATCH_BYTES", SMALL["BATCH_BYTES"])


def start(text, folder, action):
    command = [sys.executable, "-c", CHILD, str(text), str(folder), action]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


@pytest.mark.parametrize("moment", ["1", "47", "200", "manifest"])
def test_a_killed_preparation_ends_with_the_same_bytes(text, tmp_path, small, moment):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = DataConfig(source="text", path=str(text))
    prepare(config, whole, progress=False)
    child = start(text, killed, moment)
    child.communicate()
    assert child.returncode == -9
    assert prepared(config, killed) is None
    prepare(config, killed, progress=False)
    assert len(contents(killed)) > 5
    assert contents(killed) == contents(whole)


def test_a_killed_preparation_continues_from_its_progress(text, tmp_path, small, monkeypatch):
    start(text, tmp_path / "killed", "180").communicate()
    added = []
    add = scaling.data.writer.ShardWriter.add
    monkeypatch.setattr(
        scaling.data.writer.ShardWriter, "add", lambda self, *given: (added.append(1), add(self, *given))
    )
    prepare(DataConfig(source="text", path=str(text)), tmp_path / "killed", progress=False)
    assert 20 <= len(added) < 40


def test_changed_text_restarts_a_killed_preparation(text, tmp_path, small):
    config = DataConfig(source="text", path=str(text))
    start(text, tmp_path / "killed", "80").communicate()
    first = text / "000.txt"
    first.write_text(first.read_text().replace("line", "LINE"))  # same size, so the same config hash
    prepare(config, tmp_path / "killed", progress=False)
    prepare(config, tmp_path / "whole", progress=False)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_concurrent_preparations_write_once(text, tmp_path):
    children = [start(text, tmp_path / "shards", "slowly") for _ in range(2)]
    written = sorted(int(child.communicate()[0]) for child in children)
    assert written == [0, 200]


def test_a_second_call_writes_nothing(text, tmp_path):
    config = DataConfig(source="text", path=str(text))
    manifest = prepare(config, tmp_path / "shards", progress=False)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "shards").iterdir()}
    assert prepare(config, tmp_path / "shards", progress=False) == manifest == prepared(config, tmp_path / "shards")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "shards").iterdir()} == before
    assert not (tmp_path / "shards" / PROGRESS).exists()


def test_train_tokens_stops_after_the_document_that_reaches_it(text, tmp_path):
    config = DataConfig(source="text", path=str(text), train_tokens=5000)
    manifest = prepare(config, tmp_path / "shards", progress=False)
    assert 5000 <= manifest.train.tokens < 5600


def test_the_default_folder_depends_on_config_and_content(text, tmp_path):
    here = default_folder(DataConfig(source="text", path=str(text)), tmp_path)
    moved = text.rename(tmp_path / "elsewhere")
    config = DataConfig(source="text", path=str(moved))
    assert default_folder(config, tmp_path) == here
    assert here.parent == tmp_path / "data"
    assert here.name.startswith("text-")
    assert default_folder(msgspec.structs.replace(config, repeat=True), tmp_path) == here
    assert default_folder(msgspec.structs.replace(config, train_tokens=7), tmp_path) != here
    (moved / "more.txt").write_text("more")
    assert default_folder(config, tmp_path) != here


def test_a_folder_of_another_config_is_rejected(text, tmp_path):
    prepare(DataConfig(source="text", path=str(text)), tmp_path / "shards", progress=False)
    with pytest.raises(UserError, match=r"another \[data\] table"):
        prepare(DataConfig(source="text", path=str(text), train_tokens=9), tmp_path / "shards")


def test_foreign_shards_are_not_overwritten(text, tmp_path):
    (tmp_path / "theirs.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"theirs\.bin and no manifest"):
        prepare(DataConfig(source="text", path=str(text)), tmp_path, progress=False)
    assert (tmp_path / "theirs.bin").read_bytes() == b"precious"


def stream(folder, split):
    tokens = TokenStream(folder, split)
    out = np.empty(len(tokens), dtype=np.int64)
    tokens.read_into(out, 0)
    return bytes(out.astype(np.uint8)).split(b"\0")[:-1]


@pytest.mark.parametrize(("name", "lines"), [("book.txt", 1), ("rows.jsonl", 50)])
def test_few_documents_are_divided_inside(tmp_path, name, lines):
    texts = [f"{number} " + "all the words of this document, one after the other. " * 60 for number in range(lines)]
    content = texts[0] if name == "book.txt" else "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / name).write_text(content)
    manifest = prepare(DataConfig(source="text", path=str(tmp_path / name)), tmp_path / "shards", progress=False)
    parts = zip(stream(tmp_path / "shards", "train"), stream(tmp_path / "shards", "validation"), strict=True)
    assert [(train + held).decode() for train, held in parts] == texts
    assert manifest.validation.bytes / (manifest.train.bytes + manifest.validation.bytes) == pytest.approx(
        0.05, abs=1e-3
    )
    ends = document_ends(tmp_path / "shards")
    assert ends[-1].tolist() == [manifest.validation.tokens, manifest.validation.bytes]


@pytest.mark.parametrize("files", [1, 30, 250])
@pytest.mark.parametrize("published", [False, True])
def test_bounds_from_file_sizes(tmp_path, files, published):
    (tmp_path / "text").mkdir()
    for number in range(files):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}: größer und größer, 大きい\n" * 40)
    (tmp_path / "held.txt").write_text("held out\n" * 9)
    validation = str(tmp_path / "held.txt") if published else None
    config = DataConfig(source="text", path=str(tmp_path / "text"), validation=validation)
    bounds = at_most(config)
    manifest = prepare(config, tmp_path / "shards", progress=False)
    found = manifest.train.tokens, manifest.validation.tokens
    assert all(tokens <= bound for tokens, bound in zip(found, bounds, strict=True))
    if published or files < 200:
        assert sum(bounds) - sum(found) <= 4 * files


def test_a_grown_source_restarts_the_preparation(tmp_path, small, monkeypatch):
    # A Hugging Face data set without a revision can grow during an interrupted preparation.
    texts = [f"{number} and more of the same text\n" * 9 for number in range(210)]
    row = preparation.SOURCES["text"]

    def prepare_first(count, folder):
        def documents(config):
            for number, text in enumerate(texts[:count], start=1):
                if count == 150 and number == 140 and stops:
                    raise KeyboardInterrupt
                yield Document(text, None, None)

        monkeypatch.setitem(
            preparation.SOURCES, "text", dataclasses.replace(row, documents=documents, inputs=lambda config: [])
        )
        monkeypatch.setattr(preparation, "_splits_inside", lambda config: count < 200)
        prepare(DataConfig(source="text", path="any"), tmp_path / folder, progress=False)

    stops = True
    with pytest.raises(KeyboardInterrupt):
        prepare_first(150, "grown")
    assert msgspec.json.decode((tmp_path / "grown" / PROGRESS).read_bytes())["documents"] > 0
    stops = False
    prepare_first(210, "grown")
    prepare_first(210, "whole")
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")


def test_an_empty_validation_split_is_rejected_without_shards(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="of 1 documents with 1 bytes, nothing is held out"):
        prepare(DataConfig(source="text", path=str(tmp_path / "a.txt")), tmp_path / "shards", progress=False)
    assert not contents(tmp_path / "shards")


def test_empty_text_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in it"):
        prepare(DataConfig(source="text", path=str(tmp_path / "a.txt")), tmp_path / "shards", progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files, which Unix alone can")
def test_preparation_continues_after_a_full_disk(text, tmp_path, small):
    import resource
    import signal

    folder, config = tmp_path / "shards", DataConfig(source="text", path=str(text))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(UserError, match=r"shards: the disk is full .*which continues"):
            prepare(config, folder, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    prepare(config, folder, progress=False)
    prepare(config, tmp_path / "whole", progress=False)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_log_gets_plain_lines(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scaling.run.progress.LINE_SECONDS", 0.0)
    prepare(DataConfig(source="text", path=str(text)), tmp_path / "shards")
    written = capsys.readouterr().err
    assert "training tokens" in written
    assert "\x1b" not in written


def test_a_damaged_progress_file_is_rejected(text, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / PROGRESS).write_text("{")
    with pytest.raises(UserError, match=r"progress\.json: damaged"):
        prepare(DataConfig(source="text", path=str(text)), tmp_path / "shards", progress=False)
    assert not (tmp_path / "shards" / MANIFEST).exists()
