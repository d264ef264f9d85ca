"""Tokenizers: bytes, or any file of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scaling.errors import DataError
from scaling.io import Strict

BYTES = "bytes"

MAX_VOCABULARY = 2**16
"""Shards hold uint16."""

MAX_FILE_BYTES = 2**28
"""Size limit of a tokenizers file; a vocabulary of 65,536 takes far less."""

ACCEPTED = 'Give the path of a tokenizers JSON file, relative to the campaign file, or "bytes".'

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
"""Names of the token that ends a document; the first one in the vocabulary is used."""


class TokenizerInfo(Strict, frozen=True):
    """The tokenizer of a folder of shards."""

    name: str
    """``bytes``, or the name of the tokenizers file."""
    sha256: str | None
    """SHA-256 of the tokenizers file; null for bytes."""
    vocabulary: int
    """One more than the largest id."""
    separator: int
    """Id that ends each document."""


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    info: TokenizerInfo

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """Ids of each text, followed by the separator."""
        ...


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name: ``bytes`` or the path of a file.

    Raises:
        DataError: The file does not exist, is not a tokenizers file, has no token that ends a document, or has more than
            65,536 tokens.
    """
    return ByteTokenizer() if name == BYTES else FileTokenizer(Path(name))


def tokenizer_digest(name: str) -> str | None:
    """SHA-256 of the tokenizers file; None for bytes."""
    if name == BYTES:
        return None
    path = Path(name)
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise DataError(f"[data] tokenizer {name}: this is not a file. {ACCEPTED}")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(
                f"[data] tokenizer {name}: the file has {size:,} bytes; at most {MAX_FILE_BYTES:,} are accepted. {ACCEPTED}"
            )
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"[data] tokenizer {name}: the file cannot be read ({error.strerror}). {ACCEPTED}") from None


class ByteTokenizer:
    """UTF-8 bytes as ids. 0 ends a document; NUL characters in a text are removed."""

    info = TokenizerInfo(name=BYTES, sha256=None, vocabulary=256, separator=0)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """Ids of each text, followed by the separator."""
        return [
            np.frombuffer(text.replace("\0", "").encode() + b"\0", dtype=np.uint8).astype(np.uint16) for text in texts
        ]


class FileTokenizer:
    """A tokenizers JSON file, used without truncation and padding; the separator is the only special token it adds."""

    def __init__(self, path: Path) -> None:
        from scaling.data.sources.registry import optional_package

        digest = tokenizer_digest(str(path))
        optional_package("tokenizers", f"[data] tokenizer {path}")
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"[data] tokenizer {path}: not a tokenizers JSON file ({error}). {ACCEPTED}") from None
        # Files for fine-tuning may contain truncation and padding.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that contains the name of a special token must not end a document.
        self._tokenizer.encode_special_tokens = True
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        vocabulary = max(ids.values(), default=-1) + 1
        if vocabulary > MAX_VOCABULARY:
            raise DataError(
                f"[data] tokenizer {path}: its vocabulary of {vocabulary:,} does not fit the shards' 16 bits "
                f"({MAX_VOCABULARY:,}). Use a tokenizer with a smaller vocabulary."
            )
        separator = next((ids[name] for name in SEPARATORS if name in ids), None)
        if separator is None:
            raise DataError(
                f"[data] tokenizer {path}: it has no token that ends a document. "
                f"Add one of these to its special tokens: {', '.join(SEPARATORS)}."
            )
        self.info = TokenizerInfo(name=path.name, sha256=digest, vocabulary=vocabulary, separator=separator)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """Ids of each text, followed by the separator."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*one.ids, self.info.separator], dtype=np.uint16) for one in encoded]
