"""Text to token ids: bytes, or any file of the ``tokenizers`` library."""

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

LARGEST_VOCABULARY = 2**16
"""RowSharding hold uint16."""

LARGEST_FILE = 2**28
"""Bytes of a tokenizers file: many times what a vocabulary of 65,536 takes."""

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
"""Names of the token that ends a document, the first that the vocabulary has."""


class TokenizerInfo(Strict, frozen=True):
    """Which tokenizer made the shards."""

    name: str
    """``bytes``, or the name of the tokenizers file."""
    sha256: str | None
    """Of the tokenizers file; None for bytes."""
    vocabulary: int
    """Ids are below this."""
    separator: int
    """Id that ends every document."""


class Tokenizer(Protocol):
    """What `prepare` needs of a tokenizer."""

    info: TokenizerInfo

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """Ids of each text, the separator at its end included."""
        ...


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: ``bytes`` or a file's path.

    Raises:
        DataError: No such file, not a tokenizers file, no end-of-document token, or a vocabulary over 65,536.
    """
    return ByteTokenizer() if name == BYTES else FileTokenizer(Path(name))


def tokenizer_digest(name: str) -> str | None:
    """SHA-256 of the tokenizers file; None for bytes.

    Raises:
        DataError: There is no such file, or it is too large for a tokenizer.
    """
    if name == BYTES:
        return None
    path = Path(name)
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise DataError(
                f"[data] tokenizer {name}: this is not a file. "
                'Give the path of a tokenizers JSON file, relative to the campaign file, or "bytes".'
            )
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise DataError(
                f"[data] tokenizer {name}: a file of {size:,} bytes, and a tokenizers JSON file has at most "
                f'{LARGEST_FILE:,}. Give the tokenizer.json that the library writes, or "bytes".'
            )
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"[data] tokenizer {name}: the file cannot be read ({error.strerror}). "
            'Give the path of a tokenizers JSON file, relative to the campaign file, or "bytes".'
        ) from None


class ByteTokenizer:
    """UTF-8 bytes as ids; 0 ends a document, and a NUL inside a text is dropped so that nothing else is 0."""

    info = TokenizerInfo(name=BYTES, sha256=None, vocabulary=256, separator=0)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """Ids of each text, the separator at its end included."""
        return [
            np.frombuffer(text.replace("\0", "").encode() + b"\0", dtype=np.uint8).astype(np.uint16) for text in texts
        ]


class FileTokenizer:
    """A tokenizers JSON file. Adds no special token but the separator, and cuts or pads nothing."""

    def __init__(self, path: Path) -> None:
        from scaling.data.sources.registry import optional_package

        digest = tokenizer_digest(str(path))
        optional_package("tokenizers", f"[data] tokenizer {path}")
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"[data] tokenizer {path}: not a tokenizers JSON file ({error}). "
                'Give the tokenizer.json that the library writes, or "bytes".'
            ) from None
        # A file may carry settings for fine-tuning; here every token of the text is wanted and nothing else.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that spells out a special token is text, and must not forge the end of a document.
        self._tokenizer.encode_special_tokens = True
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        vocabulary = max(ids.values(), default=-1) + 1
        if vocabulary > LARGEST_VOCABULARY:
            raise DataError(
                f"[data] tokenizer {path}: its vocabulary of {vocabulary:,} does not fit the shards' 16 bits "
                f"({LARGEST_VOCABULARY:,}). Use a smaller one; scaling experiments rarely need more than 50,000."
            )
        separator = next((ids[name] for name in SEPARATORS if name in ids), None)
        if separator is None:
            raise DataError(
                f"[data] tokenizer {path}: it has no token that ends a document; known are {', '.join(SEPARATORS)}. "
                "Add one of them to the file's special tokens."
            )
        self.info = TokenizerInfo(name=path.name, sha256=digest, vocabulary=vocabulary, separator=separator)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """Ids of each text, the separator at its end included."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*one.ids, self.info.separator], dtype=np.uint16) for one in encoded]
