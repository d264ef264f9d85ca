"""Preparation of token shards: once per configuration, resumable after a kill, safe to start several times at once.

During preparation the folder holds unfinished shards and progress.json, which records how much of them was flushed to
disk; the manifest is written last. A process that finds progress.json and no manifest continues from there. It writes
the same bytes as an uninterrupted one, because documents come in a fixed order and shards have a fixed length.
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

from scaling.data.shards import DOCUMENT_ENDS, MANIFEST, Manifest, read_manifest
from scaling.data.sources.documents import (
    Split,
    content_digest,
    min_documents_to_split_by_content,
    split_by_content,
    split_inside,
)
from scaling.data.sources.registry import SOURCES, DataConfig
from scaling.data.sources.text import plain_sizes
from scaling.data.tokenizer import BYTES, Tokenizer, open_tokenizer, tokenizer_digest
from scaling.data.writer import ShardWriter, ShardWriterState
from scaling.errors import DataError
from scaling.io import Strict, file_sha256, write_atomic, write_json
from scaling.run.progress import ProgressReporter
from scaling.units import human

PROGRESS = "progress.json"
TOKENIZER_COPY = "tokenizer.json"
LAYOUT = 3
"""Version of the shards and their manifest; another version makes another folder."""

CHECKPOINT_SECONDS = 2.0
"""Seconds between two saves of progress.json."""

BATCH_BYTES = 1 << 20
"""UTF-8 bytes of text passed to the tokenizer at once; it distributes the documents over the cores."""

DISK_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Progress(Strict, frozen=True):
    """The part of a preparation that has been flushed to disk."""

    config_hash: str
    documents: int = 0
    """Documents of the source that were processed."""
    chain: str = ""
    """Hash over the contents of these documents in order, which detects that the source has changed."""
    train: ShardWriterState = ShardWriterState()
    validation: ShardWriterState = ShardWriterState()


class _SourceChanged(Exception):
    """The documents processed so far are not those that the source yields now."""


def config_hash(config: DataConfig) -> str:
    """SHA-256 of everything that decides the shards. Paths do not count, so a moved folder of text has the same hash.

    Raises:
        DataError: The files that the configuration names do not exist.
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
    """Default folder of the shards: ``<root>/data/<source>-<8 digits of the config hash>``."""
    return root / "data" / f"{config.source}-{config_hash(config)[:8]}"


def at_most(config: DataConfig) -> tuple[int, int] | None:
    """Upper bounds of the training and validation tokens from the sizes of files; None if sizes do not bound them.

    With byte tokens, each byte of a plain text file is a token, and each document ends with one more.
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
        held = sum(size + 1 for split, size in files if split == "validation")
        return total - held, held
    if len(files) >= min_documents_to_split_by_content(config.validation_fraction):
        return total, total
    held = sum(round(size * config.validation_fraction) + 4 for _, size in files)  # a character has at most 4 bytes
    return sum(size - round(size * config.validation_fraction) + 1 for _, size in files), held


def prepared(config: DataConfig, folder: Path) -> Manifest | None:
    """The manifest of a folder; None until its preparation has finished.

    Raises:
        DataError: The folder holds the shards of another configuration.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.config_hash != config_hash(config):
        raise _other_config(folder)
    return manifest


def prepare(config: DataConfig, folder: Path, *, progress: bool | None = None) -> Manifest:
    """Write the token shards of a configuration, as far as they are missing; their manifest.

    Args:
        config: What to prepare, with paths resolved.
        folder: Where to write, usually `default_folder`; created if needed.
        progress: A bar (True), lines (False), or a bar if stderr is a terminal (None).

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
            done = prepared(config, folder)  # another process may have finished while this one waited
            if done is not None:
                return done
            saved = _saved_progress(folder, config_hash(config))
            try:
                return _write(config, folder, tokenizer, saved, reporter)
            except _SourceChanged:
                reporter.print(f"{folder}: the text has changed since this preparation started; starting again.")
                return _write(config, folder, tokenizer, Progress(config_hash=saved.config_hash), reporter)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRORS:
            raise
        raise DataError(
            f"data folder {folder}: the disk is full ({error.strerror}). "
            "Free space and prepare again, which continues; or limit the shards with train_tokens in [data]."
        ) from None


def _write(
    config: DataConfig, folder: Path, tokenizer: Tokenizer, saved: Progress, reporter: ProgressReporter
) -> Manifest:
    writers: dict[Split, ShardWriter] = {
        "train": ShardWriter(folder, "train", saved.train),
        "validation": ShardWriter(folder, "validation", saved.validation),
    }
    train, validation = writers["train"], writers["validation"]

    def save(documents: int, chain: bytes) -> None:
        state = Progress(
            config_hash=saved.config_hash,
            documents=documents,
            chain=chain.hex(),
            train=train.state(),
            validation=validation.state(),
        )
        write_json(folder / PROGRESS, state)

    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        # Before the first shard: a folder with shards and without progress.json was not written by this program.
        save(saved.documents, bytes.fromhex(saved.chain))
        saved_at = time.monotonic()
        enough = config.train_tokens is not None and train.tokens >= config.train_tokens
        batches = _batches(config, saved)
        for batch in () if enough else batches:
            for ids, size, split in zip(
                tokenizer.encode(batch.texts), map(_utf8_bytes, batch.texts), batch.splits, strict=True
            ):
                writers[split].add(ids, size)
                enough = config.train_tokens is not None and train.tokens >= config.train_tokens
                if enough:
                    break
            share = batch.done if config.train_tokens is None else train.tokens / config.train_tokens
            reporter.update(share, training_tokens=human(train.tokens), held_out_tokens=human(validation.tokens))
            if enough:
                break
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save(batch.documents, batch.chain)
                saved_at = time.monotonic()
        _check_not_empty(config, folder, train, validation)
        manifest = Manifest(
            source=config.source,
            options={
                key: value for key, value in msgspec.to_builtins(config).items() if key not in ("source", "repeat")
            },
            config_hash=saved.config_hash,
            tokenizer=tokenizer.info,
            train=train.finish(),
            validation=validation.finish(),
            document_ends=file_sha256(folder / DOCUMENT_ENDS),
        )
    if config.tokenizer != BYTES:
        write_atomic(folder / TOKENIZER_COPY, Path(config.tokenizer).read_bytes())
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return manifest


class _Batch(msgspec.Struct):
    """Texts for the tokenizer, and the position of the source after them."""

    texts: list[str]
    splits: list[Split]
    documents: int
    chain: bytes
    done: float | None
    """Share of the source that was read, if known."""


def _batches(config: DataConfig, saved: Progress) -> Iterator[_Batch]:
    """Documents that were not processed yet, each with its split, in batches of about `BATCH_BYTES`."""
    inside = _splits_inside(config)
    divide = split_inside if inside else split_by_content
    chain = b"inside" if inside else b""  # a preparation that was interrupted under the other rule starts again
    number = size = 0
    held_out: set[bytes] = set()
    done: float | None = 0.0
    texts: list[str] = []
    splits: list[Split] = []
    for number, (text, split, done) in enumerate(SOURCES[config.source].documents(config), start=1):
        digest = content_digest(text)
        chain = hashlib.blake2b(chain + digest, digest_size=16).digest()
        if number == saved.documents and chain.hex() != saved.chain:
            raise _SourceChanged
        if split == "validation":
            held_out.add(digest)
        elif digest in held_out:  # a published training set may hold copies of its validation set
            continue
        if number <= saved.documents:
            continue
        for part, part_split in [(text, split)] if split else divide(text, digest, config.validation_fraction):
            texts.append(part)
            splits.append(part_split)
        size += len(text)
        if size >= BATCH_BYTES:
            yield _Batch(texts, splits, number, chain, done)
            texts, splits, size = [], [], 0
    if number < saved.documents:
        raise _SourceChanged
    if texts:
        yield _Batch(texts, splits, number, chain, done)


def _splits_inside(config: DataConfig) -> bool:
    """True if there are too few documents to split by content."""
    if config.validation is not None:
        return False
    enough = min_documents_to_split_by_content(config.validation_fraction)
    # Counted in a separate pass, because the documents may be too large to be kept in memory.
    return sum(1 for _ in itertools.islice(SOURCES[config.source].documents(config), enough)) < enough


def _saved_progress(folder: Path, expected: str) -> Progress:
    """Progress of an interrupted preparation of the configuration with this hash, or none."""
    path = folder / PROGRESS
    if not path.exists():
        foreign = sorted(file.name for file in folder.glob("*.bin"))
        if foreign:
            raise DataError(
                f"data folder {folder}: it holds {foreign[0]} and no manifest, so this program did not write it. "
                "Choose an empty folder."
            )
        return Progress(config_hash=expected)
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=Progress)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: damaged ({error}). Remove the folder and prepare the data again.") from None
    if saved.config_hash != expected:
        raise _other_config(folder)
    states: list[tuple[Split, ShardWriterState]] = [("train", saved.train), ("validation", saved.validation)]
    # If a shard was removed from outside, only the beginning is a safe point to continue from.
    complete = all(ShardWriter(folder, split, state).files_exist() for split, state in states)
    return saved if complete else Progress(config_hash=expected)


def _other_config(folder: Path) -> DataError:
    return DataError(
        f"data folder {folder}: it holds the shards of another [data] table, or of text that has changed since. "
        "Choose another folder, or remove this one and prepare again."
    )


def _check_not_empty(config: DataConfig, folder: Path, train: ShardWriter, validation: ShardWriter) -> None:
    """Raise, and remove the shards, if one split has no document; that is known only at the end of the source."""
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
        raise DataError(f"[data] {where}: the {empty} holds no document. Name other files in path or validation.")
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
    return DataError(f"[data] {_where(config)}: there is no text in it. Name a source that holds some.")


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@contextlib.contextmanager
def _claim(folder: Path, reporter: ProgressReporter) -> Iterator[None]:
    """Lock the folder; the kernel releases the lock when the process ends, however it ends."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.print(f"{folder}: another process is preparing this data; waiting for it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
