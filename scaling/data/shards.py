"""Token shards on disk: ``.bin`` files of uint16 tokens after a header, and the manifest with their checksums.

The header consists of 256 little-endian int32: magic, version, number of tokens, zeros. llm.c and the speed-run
repositories use the same layout, so they can read these shards and this program can read theirs.
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
from scaling.io import Strict, file_sha256

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN = np.dtype("<u2")
MANIFEST = "manifest.json"
DOCUMENT_ENDS = "validation-documents.bin"
END = np.dtype("<i8")

PREPARE_AGAIN = "Remove the folder and prepare the data again."


class Shard(Strict, frozen=True):
    """One ``.bin`` file."""

    file: str
    tokens: int
    sha256: str
    """SHA-256 of the whole file, header included."""


class SplitInfo(Strict, frozen=True):
    """The shards of one split, in the order of the stream."""

    shards: tuple[Shard, ...]
    documents: int
    bytes: int
    """UTF-8 bytes of the text, without separators."""

    @property
    def tokens(self) -> int:
        """Tokens of the stream, including one separator per document."""
        return sum(shard.tokens for shard in self.shards)


class Manifest(Strict, frozen=True):
    """Contents and origin of a folder of shards; written after them."""

    source: str
    options: dict[str, str | int | float | None]
    """The `DataConfig` that was prepared, with its paths at that time."""
    config_hash: str
    """Machine-independent hash of the configuration and its inputs (`scaling.data.prepare.config_hash`)."""
    tokenizer: TokenizerInfo
    train: SplitInfo
    validation: SplitInfo
    document_ends: str
    """SHA-256 of `DOCUMENT_ENDS`."""

    @property
    def vocabulary(self) -> int:
        """Ids are below this."""
        return self.tokenizer.vocabulary

    def split(self, name: Split) -> SplitInfo:
        """The split of a name."""
        return self.train if name == "train" else self.validation


def manifest_hash(manifest: Manifest | Path | str) -> str:
    """SHA-256 of the content: tokens, tokenizer, counts and document ends. Paths, names, options and dates do not count.

    Args:
        manifest: A manifest, or the folder of one.
    """
    if not isinstance(manifest, Manifest):
        manifest = read_manifest(manifest)
    tokenizer = manifest.tokenizer
    facts: list[object] = [tokenizer.sha256, tokenizer.vocabulary, tokenizer.separator, manifest.document_ends]
    for split in (manifest.train, manifest.validation):
        facts += [split.documents, split.bytes, [(shard.tokens, shard.sha256) for shard in split.shards]]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        DataError: There is no such folder, its preparation has not finished, or the file is not a manifest.
    """
    path = Path(folder) / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        what = "it holds no manifest.json" if Path(folder).is_dir() else "it does not exist"
        raise DataError(
            f"data folder {folder}: {what}, so there are no finished token shards. "
            "Prepare them with: scaling data prepare CAMPAIGN."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a manifest of token shards: {error}. {PREPARE_AGAIN}") from None


def header(tokens: int) -> bytes:
    """The first `HEADER_BYTES` of a shard that holds `tokens`."""
    values = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


def open_shard(path: Path, tokens: int | None = None) -> npt.NDArray[np.uint16]:
    """The tokens of one shard, memory-mapped, shape ``(tokens,)``.

    Args:
        path: The ``.bin`` file.
        tokens: Number of tokens by the manifest; None skips that check.

    Raises:
        DataError: The file is missing, not a shard, of another version, or its length differs from header or manifest.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"token shard {path}: cannot be read ({error.strerror}). {PREPARE_AGAIN}") from None
    values = np.frombuffer(start, dtype="<i4") if len(start) == HEADER_BYTES else np.zeros(3, dtype="<i4")
    if values[0] != MAGIC:
        raise DataError(f"{path}: not a token shard: it does not start with the number {MAGIC}. {PREPARE_AGAIN}")
    if values[1] != VERSION:
        raise DataError(
            f"{path}: a token shard of version {values[1]}, and this program reads {VERSION}. {PREPARE_AGAIN}"
        )
    count = int(values[2])
    if size != HEADER_BYTES + TOKEN.itemsize * count:
        held = (size - HEADER_BYTES) // TOKEN.itemsize
        raise DataError(
            f"{path}: its header says {count:,} tokens and the file holds {held:,}: it was cut short. {PREPARE_AGAIN}"
        )
    if tokens is not None and tokens != count:
        raise DataError(f"{path}: holds {count:,} tokens and the manifest says {tokens:,}. {PREPARE_AGAIN}")
    # A plain array over the map: slicing a memmap object takes microseconds, more than copying the slice.
    return np.asarray(np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(count,)))


def document_ends(folder: Path) -> npt.NDArray[np.int64]:
    """Tokens and UTF-8 bytes of the validation split up to the end of each document, shape ``(documents, 2)``."""
    path, documents = folder / DOCUMENT_ENDS, read_manifest(folder).validation.documents
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {PREPARE_AGAIN}") from None
    if len(content) != 2 * END.itemsize * documents:
        raise DataError(
            f"{path}: holds {len(content):,} bytes, and {documents:,} documents take {2 * END.itemsize * documents:,}. "
            f"{PREPARE_AGAIN}"
        )
    return np.frombuffer(content, dtype=END).reshape(documents, 2).astype(np.int64)


class TokenStream:
    """The shards of a split as one memory-mapped stream; headers and lengths are checked when it is created."""

    def __init__(self, folder: Path, split: Split = "train") -> None:
        self.split = read_manifest(folder).split(split)
        # An empty file cannot be mapped, and holds no tokens.
        self._shards = [open_shard(folder / shard.file, shard.tokens) for shard in self.split.shards if shard.tokens]
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Fill `out`, shape ``(length,)``, with the tokens from `start`, across shards."""
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
    """The manifest, after the SHA-256 of every file was compared with it."""
    manifest = read_manifest(folder)
    digests = {DOCUMENT_ENDS: manifest.document_ends}
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        open_shard(folder / shard.file, shard.tokens)
        digests[shard.file] = shard.sha256
    document_ends(folder)
    for file, digest in digests.items():
        found = file_sha256(folder / file)
        if found != digest:
            raise DataError(
                f"{folder / file}: its content has changed since it was written (SHA-256 {found[:12]}..., and the "
                f"manifest says {digest[:12]}...). {PREPARE_AGAIN}"
            )
    return manifest
