import itertools
import json
import lzma
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from running import finish, place
from tiny import make_spec

from scaling.data.prepare import default_folder, prepare
from scaling.data.shards import manifest_hash, read_manifest
from scaling.data.sources import stdlib
from scaling.data.sources.documents import Document, content_digest, split_by_content, split_inside
from scaling.data.sources.registry import SOURCES, DataConfig, Source
from scaling.data.sources.text import READERS, documents, find
from scaling.errors import UserError


def texts_of(path):
    return [document.text for document in documents(DataConfig(source="text", path=str(path)))]


TEXTS = ["one\nline", "größer", "三"]


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text, "source": "here"}) + "\n" for text in texts).encode()


def write_parquet(path, texts, field="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({field: texts}), path)


WRITERS = {
    ".txt": lambda path, texts: path.write_bytes("".join(texts).encode()),
    ".md": lambda path, texts: path.write_bytes("".join(texts).encode()),
    ".jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    ".jsonl.zst": lambda path, texts: path.write_bytes(
        b"".join(zstandard.compress(json_lines([text])) for text in texts)  # a frame each, as `cat a.zst b.zst` leaves
    ),
    ".jsonl.xz": lambda path, texts: path.write_bytes(lzma.compress(json_lines(texts))),
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", READERS)
def test_each_format_gives_its_texts(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    WRITERS[suffix](path, TEXTS)
    expected = ["".join(TEXTS)] if suffix in (".txt", ".md") else TEXTS
    assert texts_of(path) == expected


def test_folders_are_read_in_order_and_patterns_select(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.txt", "a.md", "inner/c.txt", "ignored.csv"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["a.md", "b.txt", "inner/c.txt"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["b.txt", "inner/c.txt"]


def test_published_validation_files_are_excluded_from_training(tmp_path):
    for name in ("train-00.txt", "train-01.txt", "validation.txt"):
        (tmp_path / name).write_text(name)
    files = find(str(tmp_path), str(tmp_path / "validation.txt"))
    assert [(split, name) for split, name, _ in files] == [
        ("validation", "validation.txt"),
        ("train", "train-00.txt"),
        ("train", "train-01.txt"),
    ]


def test_copies_of_validation_documents_are_excluded_from_training(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(json_lines(["held out", "seen", "seen too"]))
    (tmp_path / "validation.jsonl").write_bytes(json_lines(["held out"]))
    config = DataConfig(
        source="text", path=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "validation.jsonl")
    )
    manifest = prepare(config, tmp_path / "shards", progress=False)
    assert (manifest.train.documents, manifest.validation.documents) == (2, 1)


def test_split_by_content_holds_out_the_requested_fraction():
    splits = [
        split
        for text in map(str, range(20_000))
        for whole, split in split_by_content(text, content_digest(text), 0.05)
        if whole == text
    ]
    assert len(splits) == 20_000
    # Binomial with n = 20,000 and p = 0.05: four standard deviations are 123.
    assert abs(splits.count("validation") - 1000) < 123


@given(text=st.text(min_size=1, max_size=60), fraction=st.floats(0.01, 0.99))
def test_split_inside_keeps_every_character(text, fraction):
    parts = {split: part for part, split in split_inside(text, b"", fraction)}
    assert parts.get("train", "") + parts.get("validation", "") == text
    # A cut inside a character moves to its start, which is at most three bytes away.
    assert -0.5 <= len(parts.get("validation", "").encode()) - fraction * len(text.encode()) <= 3.5
    assert all(parts.values())


BAD_FILES = {
    "not UTF-8": ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8"),
    "torn line": ("a.jsonl", json_lines(TEXTS)[:-5], r"a\.jsonl, line 3: not a JSON object"),
    "no text field": (
        "a.jsonl",
        json_lines(TEXTS, "body"),
        r"line 1: there is no field .text.; the fields are body, source",
    ),
    "text is a number": ("a.jsonl", b'{"text": 3}\n', "is not a text"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(json_lines(TEXTS))[:-6], r"a\.jsonl\.zst: damaged or truncated"),
    "no zstd": ("a.jsonl.zst", json_lines(TEXTS), r"a\.jsonl\.zst: damaged or truncated"),
    "cut xz": ("a.jsonl.xz", lzma.compress(json_lines(TEXTS))[:-6], r"a\.jsonl\.xz: damaged or truncated"),
    "no parquet": ("a.parquet", b"PAR0", r"a\.parquet: not a valid Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_an_unreadable_file_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        texts_of(tmp_path)


def test_a_table_without_the_text_column_is_rejected(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    with pytest.raises(UserError, match=r"no field .text.; the fields are body"):
        texts_of(tmp_path)


def test_paths_without_text_are_rejected(tmp_path):
    with pytest.raises(UserError, match="no such file or folder, and as a pattern it matches nothing"):
        find(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="it holds no file with an accepted suffix"):
        find(str(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"suffix '\.csv' is not known. Accepted: \.txt"):
        find(str(tmp_path / "a.csv"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="every file in it is in the validation set"):
        find(str(tmp_path), str(tmp_path / "a.txt"))


BAD_TABLES = {
    "unknown source": ({"source": "pyton-library"}, 'source "pyton-library" is not known; did you mean'),
    "foreign option": ({"path": "x"}, 'source "python-library" does not take path.*use source "text"'),
    "missing option": ({"source": "text"}, 'source "text" needs path'),
}


@pytest.mark.parametrize(("table", "sentence"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_an_inconsistent_data_table_is_rejected(table, sentence):
    with pytest.raises(UserError, match=sentence):
        DataConfig(**table)


def test_relative_paths_start_at_the_campaign_file(tmp_path):
    config = DataConfig(source="text", path="texts/*.txt", validation="/held/out", tokenizer="t.json")
    resolved = config.resolved(tmp_path)
    assert (resolved.path, resolved.validation) == (str(tmp_path / "texts/*.txt"), "/held/out")
    assert resolved.tokenizer == str(tmp_path / "t.json")
    assert DataConfig().resolved(tmp_path) == DataConfig()


def test_reading_a_data_table_imports_nothing_heavy():
    code = "import sys, scaling.data.sources.registry; print(sorted({'torch','numpy','datasets','tokenizers','pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_standard_library_is_enough_text_without_repeats():
    texts = [document.text for document in SOURCES["python-library"].documents(DataConfig())]
    assert sum(map(len, texts)) > 0.9 * stdlib.MIN_TEXT_BYTES
    assert len(set(texts)) == len(texts)
    again = [document.text for document in itertools.islice(stdlib.documents(DataConfig()), 50)]
    assert again == texts[:50]


def test_packages_are_read_only_if_the_library_is_small(tmp_path, monkeypatch):
    for name in (
        "lib/json/decoder.py",
        "lib/encodings/cp1.py",
        "site/a/b.py",
        "site/c.md",
        "site/large.py",
        "site/d.c",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#" * (stdlib.MAX_PACKAGE_FILE_BYTES + 1 if "large" in name else 100))
    roots = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "site", "platlib": tmp_path / "site"}
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda key: str(roots[key]))
    monkeypatch.setattr(stdlib, "MIN_TEXT_BYTES", 100)
    assert [name for name, _, _ in stdlib.find()] == ["json/decoder.py"]
    monkeypatch.setattr(stdlib, "MIN_TEXT_BYTES", 1000)
    assert {name for name, _, _ in stdlib.find()} == {"json/decoder.py", "packages/a/b.py", "packages/c.md"}


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["the cat and the hat " * 20], trainer)
    tokenizer.enable_truncation(4)  # as files for fine-tuning have it; a stream must not be cut
    tokenizer.enable_padding(length=8)
    path = tmp_path / "some-tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizers_file_encodes_whole_texts(tokenizer_file, tmp_path):
    import numpy as np
    import tokenizers

    from scaling.data.shards import TokenStream

    texts = [f"the {word} and a forged <|endoftext|> in größer text" for word in range(20)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    config = DataConfig(
        source="text", path=str(tmp_path / "a.jsonl"), tokenizer=str(tokenizer_file), validation_fraction=0.5
    )
    folder = default_folder(config, tmp_path)
    manifest = prepare(config, folder, progress=False)
    assert manifest.tokenizer.name == "some-tokenizer.json"
    assert manifest.tokenizer.separator == 1
    kept = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for split in ("train", "validation"):
        stream = TokenStream(folder, split)
        tokens = np.empty(len(stream), dtype=np.int64)
        stream.read_into(tokens, 0)
        assert tokens.max() < manifest.vocabulary
        ends = [-1, *np.flatnonzero(tokens == manifest.tokenizer.separator)]
        found += [kept.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]
    assert sorted(found) == sorted(texts)


def test_the_config_hash_covers_the_tokenizer_file(tokenizer_file, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config = DataConfig(source="text", path=str(tmp_path / "a.txt"), tokenizer=str(tokenizer_file))
    before = default_folder(config, tmp_path)
    tokenizer_file.write_text(tokenizer_file.read_text() + "\n")
    assert default_folder(config, tmp_path) != before


def word_level(path, words):
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": words[0]}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "model": model}))
    return path


def test_unusable_tokenizers_are_rejected(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("x")

    def prepare_with(tokenizer):
        config = DataConfig(source="text", path=str(tmp_path / "a.txt"), tokenizer=str(tokenizer))
        return prepare(config, tmp_path / "shards", progress=False)

    with pytest.raises(UserError, match="65,537 does not fit the shards' 16 bits"):
        prepare_with(word_level(tmp_path / "large.json", ["</s>", *map(str, range(65_536))]))
    with pytest.raises(UserError, match="no token that ends a document"):
        prepare_with(word_level(tmp_path / "endless.json", ["a", "b"]))
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match=r"none\.json: not a tokenizers JSON file"):
        prepare_with(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"gone\.json: the file cannot be read"):
        prepare_with(tmp_path / "gone.json")


def test_a_missing_extra_is_reported_with_the_command(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    config = DataConfig(
        source="text", path=str(tmp_path / "a.txt"), tokenizer=str(word_level(tmp_path / "t.json", ["</s>"]))
    )
    with pytest.raises(UserError, match=r"needs the package tokenizers.*pip install 'scaling-harness\[data\]'"):
        prepare(config, tmp_path / "shards")


def test_a_hugging_face_data_set_is_streamed(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines([f"text {number}" for number in range(30)]))
    (folder / "test.jsonl").write_bytes(json_lines(["text 3", "held out"]))
    config = DataConfig(source="hf", name=str(folder), validation="test")
    manifest = prepare(config, tmp_path / "shards", progress=False)
    assert (manifest.train.documents, manifest.validation.documents) == (29, 2)
    assert read_manifest(tmp_path / "shards") == manifest
    for change, sentence in (
        ({"split": "nope"}, "Bad split: nope"),
        ({"text_field": "body"}, "no text in the field .body.; the fields are source, text"),
        ({"validation": "train"}, "is the split that is trained on"),
    ):
        options = {"source": "hf", "name": str(folder), **change}
        with pytest.raises(UserError, match=sentence):
            prepare(DataConfig(**options), tmp_path / "other", progress=False)
        for left in (tmp_path / "other").iterdir():
            left.unlink()


@pytest.mark.parametrize("option", ["path", "tokenizer", "validation", "name"])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("~no-such-user/x", r"cannot be read .Could not determine home"),
        ("a\0b", r"'a\\x00b' holds a control character"),
        ("x\x1b[31m", "holds a control character"),
        ("x" * 5000, "5,000 characters long, and at most 1,024"),
        ("x" * 300 + "/y/z", "cannot be read|there is no such folder"),
        ("/dev/zero", "it holds no file|is not a file|no folder of this name"),
        ("/proc", "cannot be read|it holds no file|is not a file|no folder of this name"),
        ("", "is empty"),
    ],
)
def test_unreadable_values_are_one_short_sentence(tmp_path, option, value, sentence):
    (tmp_path / "a.txt").write_text("x")
    source = {"source": "hf"} if option == "name" else {"source": "text", "path": str(tmp_path / "a.txt")}
    with pytest.raises(UserError, match=sentence) as error:
        default_folder(DataConfig(**{**source, option: value}).resolved(tmp_path), tmp_path)
    assert f"[data] {option}" in str(error.value)
    assert len(str(error.value)) < 600


def test_an_unreachable_hub_is_queried_once(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    queries = []

    def unreachable(self, *given, **options):
        queries.append(given)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"Hub cannot be reached \(no route to host\)"):
        prepare(DataConfig(source="hf", name="owner/name"), tmp_path / "shards", progress=False)
    assert queries == [("owner/name",)]


def test_a_registered_source_is_prepared_and_trained_on(tmp_path, monkeypatch):
    def sums(config):
        for part in range(250):
            yield Document("".join(f"{n} plus {part} is {n + part}\n" for n in range(20)), None, part / 250)

    monkeypatch.setitem(SOURCES, "sums", Source(label="sums", documents=sums, inputs=lambda config: ["1"]))
    config = DataConfig(source="sums")
    folder = default_folder(config, tmp_path)
    assert folder.name.startswith("sums-")
    manifest = prepare(config, folder, progress=False)
    assert manifest.train.documents + manifest.validation.documents == 250
    spec = make_spec(manifest=manifest_hash(manifest))
    assert finish(place(spec, tmp_path / "runs", folder)).status == "finished"
