"""The tokenizer of a run's data as the files that ``AutoTokenizer`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from scaling.data.prepare import TOKENIZER_COPY
from scaling.data.shards import Manifest
from scaling.data.tokenizer import BYTES
from scaling.errors import UserError

BYTE_SEPARATOR = "<|endoftext|>"
"""Name of the byte tokenizer's id 0 in the exported files."""


def tokenizer_files(data: Path, manifest: Manifest, *, context: int) -> dict[str, bytes]:
    """Content of tokenizer.json and tokenizer_config.json by name.

    Args:
        data: Data folder, which keeps a copy of the tokenizers file it was prepared with.
        manifest: The manifest of that folder.
        context: Longest input of the model.

    Raises:
        UserError: The copy is missing or damaged.
    """
    if manifest.tokenizer.name == BYTES:
        content, separator = byte_tokenizer(), BYTE_SEPARATOR
    else:
        path = data / TOKENIZER_COPY
        try:
            content = msgspec.json.decode(path.read_bytes())
            separator = _name_of(content, manifest.tokenizer.separator)
        except (OSError, msgspec.DecodeError, KeyError, StopIteration) as error:
            raise UserError(
                f"{path}: the tokenizer that the data were prepared with is missing or damaged ({error!r}). "
                "Remove the data folder and prepare it again."
            ) from None
        # As in preparation: a text is neither truncated nor extended.
        content |= {"truncation": None, "padding": None, "post_processor": None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": content, "tokenizer_config.json": config}
    return {name: msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n" for name, value in files.items()}


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizers file whose ids are the UTF-8 bytes of the text, and 0 the end of a document.

    Byte-level BPE without a merge. The character of byte 0 is not in it, so a NUL is dropped as in the shards.
    """
    vocabulary = {BYTE_SEPARATOR: 0, **{_byte_letter(byte): byte for byte in range(1, 256)}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": BYTE_SEPARATOR, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _byte_letter(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte: itself, or one from U+0100 on, counted up.

    Source: the mapping of GPT-2, which the ByteLevel parts of the tokenizers library follow.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))


def _name_of(content: dict[str, Any], number: int) -> str:
    for token in content.get("added_tokens") or []:
        if token["id"] == number:
            return str(token["content"])
    vocabulary: dict[str, int] = content["model"]["vocab"]
    return next(name for name, found in vocabulary.items() if found == number)
