"""Text to token shards: once per wish, whatever kills it and however many ask at once.

While it works, the folder holds the shards as far as they are written and progress.json, which says how much of them
is on disk for good; the manifest comes last. A process that finds progress and no manifest goes on from there and
ends with the bytes that an uninterrupted one would have written, since documents come in a fixed order and shards
are cut at a fixed number of tokens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from scaling.data.shards import DOCUMENT_ENDS, MANIFEST, Manifest, file_digest, read_manifest
from scaling.data.sources.documents import (
    Split,
    content_digest,
    documents_to_choose_from,
    split_by_content,
    split_inside,
)
from scaling.data.sources.registry import SOURCES, DataConfig
from scaling.data.sources.text import plain_sizes
from scaling.data.tokenizer import BYTES, Tokenizer, open_tokenizer, tokenizer_digest
from scaling.data.writer import ShardWriter, ShardWriterState
from scaling.errors import DataError
from scaling.io import Strict, write_atomic, write_json
from scaling.run.progress import ProgressReporter
from scaling.units import human

PROGRESS = "progress.json"
TOKENIZER_COPY = "tokenizer.json"
LAYOUT = 2
"""Raised when the same wish would give other shards, so that old folders are not taken for new ones."""

CHECKPOINT_SECONDS = 2.0
"""Between two points that a killed preparation can go on from."""

BATCH_BYTES = 1 << 20
"""Text handed to the tokenizer at once; it spreads the documents over the cores."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Progress(Strict, frozen=True):
    """How much of a preparation is on disk for good."""

    wish: str
    documents: int = 0
    """Documents of the source that are dealt with."""
    chain: str = ""
    """Hash over the contents of all of them in order: whether the source is still the one that was begun with."""
    train: ShardWriterState = ShardWriterState()
    validation: ShardWriterState = ShardWriterState()


class _SourceChanged(Exception):
    """The documents already dealt with are not the ones that the source gives now."""


def config_hash(config: DataConfig) -> str:
    """SHA-256 of everything that decides the shards; no path is in it, so a moved folder of text is the same wish.

    Raises:
        DataError: The files that the configuration names are not there.
    """
    facts = [
        LAYOUT,
        config.source,
        SOURCES[config.source].inputs(config),
        config.text_field or "text",
        tokenizer_digest(config.tokenizer),
        config.train_tokens,
        None if config.validation is not None else config.validation_fraction,
    ]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def default_folder(config: DataConfig, root: Path) -> Path:
    """Where the shards of this wish belong: ``<root>/data/<source>-<8 digits of the wish's hash>``.

    Raises:
        DataError: The files that the configuration names are not there.
    """
    return root / "data" / f"{config.source}-{config_hash(config)[:8]}"


def at_most(config: DataConfig) -> tuple[int, int] | None:
    """Upper bounds of the training and validation tokens, before any text is read; None where sizes do not say.

    Of plain text files every byte is a token, and every document ends with one more.

    Raises:
        DataError: The files are not there, or all of them are empty.
    """
    if config.tokenizer != BYTES or config.source != "text":
        return None
    assert config.path is not None
    files = plain_sizes(config.path, config.validation)
    if files is None:
        return None
    if not any(size for _, size in files):
        raise _no_text(config)
    total = sum(size + 1 for _, size in files)
    if config.validation is not None:
        held = sum(size + 1 for half, size in files if half == "validation")
        return total - held, held
    if len(files) >= documents_to_choose_from(config.validation_fraction):
        return total, total
    held = sum(round(size * config.validation_fraction) + 4 for _, size in files)  # a character has 4 bytes at most
    return sum(size - round(size * config.validation_fraction) + 1 for _, size in files), held


def prepared(config: DataConfig, folder: Path) -> Manifest | None:
    """What the folder holds, or None while its preparation has not finished.

    Raises:
        DataError: It holds the shards of another wish.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.wish != config_hash(config):
        raise _other_config(folder)
    return manifest


def prepare(config: DataConfig, folder: Path, *, progress: bool | None = None) -> Manifest:
    """The manifest of the wish's token shards, writing what is missing of them.

    Args:
        config: The wish, with paths resolved.
        folder: Where to write; made if needed, `default_folder` as a rule.
        progress: True for a bar, False for silence; None for a bar on a terminal and a line now and then elsewhere.

    Raises:
        DataError: The text or the tokenizer cannot be used, the folder holds something else, or the disk is full.
    """
    done = prepared(config, folder)
    if done is not None:
        return done
    tokenizer = open_tokenizer(config.tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ProgressReporter(config.source, total=1.0, bar=progress) as reporter, _claim(folder, reporter):
            done = prepared(config, folder)  # another process may have written it while this one waited
            if done is not None:
                return done
            begun = _begun(folder, config_hash(config))
            try:
                return _write(config, folder, tokenizer, begun, reporter)
            except _SourceChanged:
                reporter.print(f"{folder}: the text has changed since this preparation was begun; starting over.")
                return _write(config, folder, tokenizer, Progress(wish=begun.wish), reporter)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(
            f"data folder {folder}: no room to write ({error.strerror}). "
            "Make room and prepare again: it goes on from where it stopped. train_tokens in [data] makes less of it."
        ) from None


def _write(
    config: DataConfig, folder: Path, tokenizer: Tokenizer, begun: Progress, reporter: ProgressReporter
) -> Manifest:
    writers: dict[Split, ShardWriter] = {
        "train": ShardWriter(folder, "train", begun.train),
        "validation": ShardWriter(folder, "validation", begun.validation),
    }
    train, validation = writers["train"], writers["validation"]

    def note(documents: int, chain: bytes) -> None:
        state = Progress(
            wish=begun.wish, documents=documents, chain=chain.hex(), train=train.state(), validation=validation.state()
        )
        write_json(folder / PROGRESS, state)

    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        # Written before the first shard, so that a folder with shards and without progress is somebody else's.
        note(begun.documents, bytes.fromhex(begun.chain))
        noted = time.monotonic()
        enough = config.train_tokens is not None and train.tokens >= config.train_tokens
        batches = _batches(config, begun)
        for batch in () if enough else batches:
            for ids, size, half in zip(
                tokenizer.encode(batch.texts), map(_utf8_bytes, batch.texts), batch.halves, strict=True
            ):
                writers[half].add(ids, size)
                enough = config.train_tokens is not None and train.tokens >= config.train_tokens
                if enough:
                    break
            share = batch.done if config.train_tokens is None else train.tokens / config.train_tokens
            reporter.update(share, training_tokens=human(train.tokens), held_out_tokens=human(validation.tokens))
            if enough:
                break
            if time.monotonic() - noted > CHECKPOINT_SECONDS:
                note(batch.documents, batch.chain)
                noted = time.monotonic()
        _refuse_empty(config, folder, train, validation)
        manifest = Manifest(
            source=config.source,
            options={
                key: value for key, value in msgspec.to_builtins(config).items() if key not in ("source", "repeat")
            },
            wish=begun.wish,
            tokenizer=tokenizer.info,
            train=train.finish(),
            validation=validation.finish(),
            document_ends=file_digest(folder / DOCUMENT_ENDS),
        )
    if config.tokenizer != BYTES:
        write_atomic(folder / TOKENIZER_COPY, Path(config.tokenizer).read_bytes())
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return manifest


class _Batch(msgspec.Struct):
    """Documents for the tokenizer, and where the source stands behind them."""

    texts: list[str]
    halves: list[Split]
    documents: int
    chain: bytes
    done: float | None


def _batches(config: DataConfig, begun: Progress) -> Iterator[_Batch]:
    """Documents after those already dealt with, in pieces of about `BATCH_BYTES`, each with its half.

    Raises:
        _SourceChanged: Those already dealt with are other ones now.
    """
    inside = _splits_inside(config)
    split = split_inside if inside else split_by_content
    chain = b"inside" if inside else b""  # an interrupted preparation goes on only under the rule that it began with
    number = size = 0
    held_out: set[bytes] = set()
    done: float | None = 0.0
    texts: list[str] = []
    halves: list[Split] = []
    for number, (text, half, done) in enumerate(SOURCES[config.source].documents(config), start=1):
        digest = content_digest(text)
        chain = hashlib.blake2b(chain + digest, digest_size=16).digest()
        if number == begun.documents and chain.hex() != begun.chain:
            raise _SourceChanged
        if half == "validation":
            held_out.add(digest)
        elif digest in held_out:  # a published training set may hold copies of its validation set
            continue
        if number <= begun.documents:
            continue
        for part, side in [(text, half)] if half else split(text, digest, config.validation_fraction):
            texts.append(part)
            halves.append(side)
        size += len(text)
        if size >= BATCH_BYTES:
            yield _Batch(texts, halves, number, chain, done)
            texts, halves, size = [], [], 0
    if number < begun.documents:
        raise _SourceChanged
    if texts:
        yield _Batch(texts, halves, number, chain, done)


def _splits_inside(config: DataConfig) -> bool:
    """Whether there are too few documents for a split by content."""
    if config.validation is not None:
        return False
    enough = documents_to_choose_from(config.validation_fraction)
    # Counted in a pass of its own, since documents may be too large to keep so many of them.
    return sum(1 for _ in itertools.islice(SOURCES[config.source].documents(config), enough)) < enough


def _begun(folder: Path, wish: str) -> Progress:
    """Where an earlier preparation stopped, or the start."""
    path = folder / PROGRESS
    if not path.exists():
        foreign = sorted(file.name for file in folder.glob("*.bin"))
        if foreign:
            raise DataError(
                f"data folder {folder}: holds {foreign[0]} and no manifest, so this program did not write it. "
                "Choose an empty folder."
            )
        return Progress(wish=wish)
    try:
        begun = msgspec.json.decode(path.read_bytes(), type=Progress)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: damaged ({error}). Remove the folder and prepare the data again.") from None
    if begun.wish != wish:
        raise _other_config(folder)
    # Somebody may have removed a shard; then the start is the only safe point.
    states: list[tuple[Split, ShardWriterState]] = [("train", begun.train), ("validation", begun.validation)]
    whole = all(ShardWriter(folder, half, state).is_there() for half, state in states)
    return begun if whole else Progress(wish=wish)


def _other_config(folder: Path) -> DataError:
    return DataError(
        f"data folder {folder}: holds the shards of another [data] table, or of text that has changed since. "
        "Choose another folder, or remove this one and prepare again."
    )


def _refuse_empty(config: DataConfig, folder: Path, train: ShardWriter, validation: ShardWriter) -> None:
    """A half without a document is found out at the end alone, and cannot be gone on from."""
    if train.documents and validation.documents:
        return
    train.discard()
    validation.discard()
    (folder / PROGRESS).unlink()
    total = train.documents + validation.documents
    where = _where(config)
    if not total:
        raise _no_text(config)
    if config.validation is not None:
        empty = "validation set" if train.documents else "training set"
        raise DataError(f"[data] {where}: the {empty} holds no document. Name another in path or validation.")
    empty, side = ("held out", "larger") if train.documents else ("left to train on", "smaller")
    capped = "" if config.train_tokens is None else "a larger train_tokens, "
    raise DataError(
        f"[data] {where}: of {total:,} documents with {train.bytes + validation.bytes:,} bytes, nothing is {empty} at "
        f"validation_fraction = {config.validation_fraction:g}. "
        f"Use {capped}a {side} fraction or more text, or name a validation set in validation."
    )


def _where(config: DataConfig) -> str:
    return config.path or config.name or SOURCES[config.source].label


def _no_text(config: DataConfig) -> DataError:
    return DataError(f"[data] {_where(config)}: there is no text in it. Name files that hold some.")


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@contextlib.contextmanager
def _claim(folder: Path, reporter: ProgressReporter) -> Iterator[None]:
    """Hold the folder; the kernel lets go of it with the process, however that ends."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.print(f"{folder}: another process is preparing these data; waiting for it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
