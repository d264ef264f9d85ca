"""Writer of token shards: appends documents, flushes to disk, and continues after a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from scaling.data.shards import DOCUMENT_ENDS, END, HEADER_BYTES, TOKEN, Shard, SplitInfo, header
from scaling.data.sources.documents import Split
from scaling.io import file_sha256
from scaling.spec import Strict

SHARD_TOKENS = 100_000_000
"""Tokens of a full shard: 200 MB, the usual shard size of public token sets."""


class ShardWriterState(Strict, frozen=True):
    """The part of one split that has been flushed to disk."""

    shards: tuple[Shard, ...] = ()
    """Finished shards, each full."""
    open_tokens: int = 0
    """Tokens of the shard that is being written."""
    documents: int = 0
    bytes: int = 0


class ShardWriter:
    """Appends documents to the shards of one split.

    For the validation split it also writes the end of each document (`scaling.data.shards.document_ends`). A shard's
    header counts 0 tokens until the shard is finished, so readers reject a shard that is being written.

    Args:
        folder: Where the shards are written.
        split: Name of the split.
        state: State of an earlier writer, which this one continues.
    """

    def __init__(self, folder: Path, split: Split, state: ShardWriterState) -> None:
        self.folder = folder
        self.split = split
        self.documents = state.documents
        self.bytes = state.bytes
        self._shards = list(state.shards)
        self._open_tokens = state.open_tokens
        self._file: IO[bytes] | None = None
        self._ends_path = folder / DOCUMENT_ENDS if split == "validation" else None
        self._ends: IO[bytes] | None = None

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.tokens for shard in self._shards) + self._open_tokens

    def files_exist(self) -> bool:
        """True if all files exist and are at least as long as the state says."""
        sizes = {self.folder / shard.file: shard.tokens for shard in self._shards}
        if self._open_tokens:
            sizes[self._open_path] = self._open_tokens
        lengths = {path: HEADER_BYTES + TOKEN.itemsize * tokens for path, tokens in sizes.items()}
        if self._ends_path and self.documents:
            lengths[self._ends_path] = 2 * END.itemsize * self.documents
        return all(path.exists() and path.stat().st_size >= length for path, length in lengths.items())

    def add(self, ids: npt.NDArray[np.uint16], size: int) -> None:
        """Append one document.

        Args:
            ids: Its tokens including the separator, shape ``(tokens,)``.
            size: UTF-8 bytes of its text.
        """
        ends = self._ends_file(self._ends_path) if self._ends_path else None
        self.documents += 1
        self.bytes += size
        while len(ids):
            piece = ids[: SHARD_TOKENS - self._open_tokens]
            self._shard_file().write(piece.astype(TOKEN, copy=False).tobytes())
            self._open_tokens += len(piece)
            ids = ids[len(piece) :]
            if self._open_tokens == SHARD_TOKENS:
                self._finish_shard()
        if ends is not None:
            ends.write(np.array([self.tokens, self.bytes], dtype=END).tobytes())

    def state(self) -> ShardWriterState:
        """State after everything written so far was flushed to disk."""
        for file in (self._file, self._ends):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        return ShardWriterState(
            shards=tuple(self._shards), open_tokens=self._open_tokens, documents=self.documents, bytes=self.bytes
        )

    def finish(self) -> SplitInfo:
        """Finish the last shard; the shards and counts of the split."""
        self.state()
        if self._open_tokens:
            self._finish_shard()
        return SplitInfo(shards=tuple(self._shards), documents=self.documents, bytes=self.bytes)

    def close(self) -> None:
        """Close the files; a later writer can continue them."""
        self._close_shard()
        if self._ends is not None:
            self._ends.close()
            self._ends = None

    def discard(self) -> None:
        """Remove every file of this split."""
        self.close()
        for path in (*(self.folder / shard.file for shard in self._shards), self._open_path):
            path.unlink(missing_ok=True)
        if self._ends_path:
            self._ends_path.unlink(missing_ok=True)

    @property
    def _open_path(self) -> Path:
        return self.folder / f"{self.split}-{len(self._shards):05d}.bin"

    def _ends_file(self, path: Path) -> IO[bytes]:
        if self._ends is None:
            self._ends = path.open("r+b" if self.documents else "wb")
            self._ends.truncate(2 * END.itemsize * self.documents)
            self._ends.seek(0, os.SEEK_END)
        return self._ends

    def _shard_file(self) -> IO[bytes]:
        if self._file is None:
            if self._open_tokens:
                self._file = self._open_path.open("r+b")
                # Documents written after the state was saved are written again.
                self._file.truncate(HEADER_BYTES + TOKEN.itemsize * self._open_tokens)
                self._file.seek(0, os.SEEK_END)
            else:
                self._file = self._open_path.open("wb")
            self._write_header(self._file, 0)
        return self._file

    def _finish_shard(self) -> None:
        path, file = self._open_path, self._shard_file()
        self._write_header(file, self._open_tokens)
        os.fsync(file.fileno())
        self._close_shard()
        self._shards.append(Shard(file=path.name, tokens=self._open_tokens, sha256=file_sha256(path)))
        self._open_tokens = 0

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def _write_header(file: IO[bytes], tokens: int) -> None:
        file.seek(0)
        file.write(header(tokens))
        file.flush()
        file.seek(0, os.SEEK_END)
