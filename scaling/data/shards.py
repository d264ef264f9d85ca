"""Token shards on disk: ``.bin`` files of uint16 tokens behind a header, and the manifest that vouches for them.

The header is 256 int32, little-endian: magic, version, number of tokens, then zeros: the layout of llm.c's training
files and of the speed-run repositories that followed it, so their shards and these can be read by each other.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from scaling.data.sources.documents import Split
from scaling.data.tokenizer import TokenizerInfo
from scaling.errors import DataError
from scaling.io import Strict

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN = np.dtype("<u2")
MANIFEST = "manifest.json"
DOCUMENT_ENDS = "validation-documents.bin"
END = np.dtype("<i8")


class Shard(Strict, frozen=True):
    """One ``.bin`` file."""

    file: str
    tokens: int
    sha256: str
    """Of the whole file, header included."""


class SplitInfo(Strict, frozen=True):
    """The shards of one half, in the order of the stream."""

    shards: tuple[Shard, ...]
    documents: int
    bytes: int
    """UTF-8 bytes of the text, separators left out."""

    @property
    def tokens(self) -> int:
        """Tokens of the stream, one separator a document included."""
        return sum(shard.tokens for shard in self.shards)


class Manifest(Strict, frozen=True):
    """What a folder of shards holds and what it was made from; written last."""

    source: str
    options: dict[str, str | int | float | None]
    """The wish it was made for (`DataConfig`), paths as they were then."""
    wish: str
    """What it was made from, machine-independent (`scaling.data.prepare.config_hash`)."""
    tokenizer: TokenizerInfo
    train: SplitInfo
    validation: SplitInfo
    document_ends: str
    """SHA-256 of `DOCUMENT_ENDS`."""

    @property
    def vocabulary(self) -> int:
        """Ids are below this."""
        return self.tokenizer.vocabulary

    def split(self, half: Split) -> SplitInfo:
        """The half by its name."""
        return self.train if half == "train" else self.validation


def manifest_hash(manifest: Manifest | Path | str) -> str:
    """SHA-256 of the content: tokens, tokenizer, counts and document ends. No path, name, option or date changes it.

    Args:
        manifest: A manifest, or a folder that holds one.
    """
    if not isinstance(manifest, Manifest):
        manifest = read_manifest(manifest)
    tokenizer = manifest.tokenizer
    facts: list[object] = [tokenizer.sha256, tokenizer.vocabulary, tokenizer.separator, manifest.document_ends]
    for split in (manifest.train, manifest.validation):
        facts += [split.documents, split.bytes, [(shard.tokens, shard.sha256) for shard in split.shards]]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def read_manifest(folder: Path | str) -> Manifest:
    """What a folder of shards holds.

    Raises:
        DataError: There is no such folder, its preparation has not finished, or the file is not a manifest.
    """
    path = Path(folder) / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        what = "holds no manifest.json" if Path(folder).is_dir() else "is not there"
        raise DataError(
            f"data folder {folder}: {what}, so there are no finished token shards. "
            "Write them with: scaling data prepare CAMPAIGN."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a manifest of token shards: {error}. Remove the folder and prepare the data again."
        ) from None


def header(tokens: int) -> bytes:
    """The first `HEADER_BYTES` of a shard that holds `tokens`."""
    values = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


def open_shard(path: Path, tokens: int | None = None) -> npt.NDArray[np.uint16]:
    """The tokens of one shard, memory-mapped, shape ``(tokens,)``.

    Args:
        path: The ``.bin`` file.
        tokens: What the manifest says it holds, where there is one.

    Raises:
        DataError: The file is missing, foreign, of another version, or not as long as header or manifest say.
    """
    again = "Remove the folder and prepare the data again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"token shard {path}: cannot be read ({error.strerror}). {again}") from None
    values = np.frombuffer(start, dtype="<i4") if len(start) == HEADER_BYTES else np.zeros(3, dtype="<i4")
    if values[0] != MAGIC:
        raise DataError(f"{path}: not a token shard: it does not start with the number {MAGIC}. {again}")
    if values[1] != VERSION:
        raise DataError(f"{path}: a token shard of version {values[1]}, and this program reads {VERSION}. {again}")
    count = int(values[2])
    if size != HEADER_BYTES + TOKEN.itemsize * count:
        held = (size - HEADER_BYTES) // TOKEN.itemsize
        raise DataError(
            f"{path}: its header says {count:,} tokens and the file holds {held:,}: it was cut short. {again}"
        )
    if tokens is not None and tokens != count:
        raise DataError(f"{path}: holds {count:,} tokens and the manifest says {tokens:,}. {again}")
    # A plain view of the map: every slice of a memmap object costs microseconds, more than its copy.
    return np.asarray(np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(count,)))


def document_ends(folder: Path) -> npt.NDArray[np.int64]:
    """Tokens and UTF-8 bytes of the validation split up to the end of each document, shape ``(documents, 2)``.

    Raises:
        DataError: The file is missing, or not as long as the manifest says.
    """
    path, documents = folder / DOCUMENT_ENDS, read_manifest(folder).validation.documents
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Remove the folder and prepare the data again."
        ) from None
    if len(content) != 2 * END.itemsize * documents:
        raise DataError(
            f"{path}: holds {len(content):,} bytes, and {documents:,} documents take {2 * END.itemsize * documents:,}. "
            "Remove the folder and prepare the data again."
        )
    return np.frombuffer(content, dtype=END).reshape(documents, 2).astype(np.int64)


class TokenStream:
    """Several shards as one stream, memory-mapped; headers and lengths are checked when it is made."""

    def __init__(self, folder: Path, half: Split = "train") -> None:
        self.split = read_manifest(folder).split(half)
        # An empty file cannot be mapped, and adds nothing.
        self._shards = [open_shard(folder / shard.file, shard.tokens) for shard in self.split.shards if shard.tokens]
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Fill `out`, shape ``(length,)``, with the tokens from `start` on, across shards.

        Raises:
            IndexError: The stream ends before that, or `start` is negative.
        """
        if start < 0 or start + len(out) > len(self):
            raise IndexError(f"tokens {start:,} to {start + len(out):,} of a stream of {len(self):,}")
        number = bisect.bisect_right(self._ends, start)
        filled = 0
        while filled < len(out):
            shard = self._shards[number]
            offset = start + filled - (self._ends[number] - len(shard))
            piece = shard[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1


def verify(folder: Path) -> Manifest:
    """The manifest, after every byte of every shard was read and its SHA-256 compared.

    Raises:
        DataError: A shard is missing, cut short, or has other content than the manifest says.
    """
    manifest = read_manifest(folder)
    digests = {DOCUMENT_ENDS: manifest.document_ends}
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        open_shard(folder / shard.file, shard.tokens)
        digests[shard.file] = shard.sha256
    document_ends(folder)
    for file, digest in digests.items():
        found = file_digest(folder / file)
        if found != digest:
            raise DataError(
                f"{folder / file}: its content has changed since it was written (SHA-256 {found[:12]}..., and the "
                f"manifest says {digest[:12]}...). Remove the folder and prepare the data again."
            )
    return manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
