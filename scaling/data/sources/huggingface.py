"""Source ``hf``: a Hugging Face data set, streamed, so that only the shards are kept on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.data.sources.documents import Document, Split
from scaling.data.sources.registry import DataConfig, optional_package
from scaling.errors import DataError

HUB_TIMEOUT_SECONDS = 10.0
"""Time until the Hub counts as unreachable."""


def inputs(config: DataConfig) -> list[str]:
    """The options that select the data set."""
    name = config.name
    assert name is not None  # `Source.needs`
    if Path(name).is_absolute():
        # `datasets` does not finish listing the kernel's own file systems.
        if not Path(name).is_dir() or Path(name).parts[1] in ("proc", "sys"):
            raise DataError(
                f"[data] name {name}: there is no folder of this name that can hold data. "
                "Name a folder with data files, or a data set of the Hub."
            )
    elif not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name, re.ASCII):
        raise DataError(
            f"[data] name {name}: there is no such folder, and names on the Hub have the form OWNER/NAME, each of at most 96 "
            "letters, digits, -, _ and full stops. Correct the name."
        )
    return [str(field) for field in (name, config.subset, config.split or "train", config.revision, config.validation)]


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of the split `validation`, then those of `split`, in the order of the data set.

    Empty and null texts are skipped.

    Raises:
        DataError: The extra is not installed, the data set or split cannot be opened, or there is no text field.
    """
    optional_package("datasets", f'[data] source "hf" ({config.name})')
    split, validation = config.split or "train", config.validation
    parts: list[tuple[str, Split | None]] = [(split, None)]
    if validation is not None:
        if validation == split:
            raise DataError(f'[data] validation "{validation}" is the split that is trained on. Name another split.')
        parts = [(validation, "validation"), (split, "train")]
    for part, target in parts:
        for text in _texts(config, part):
            yield Document(text, target, None)


def _texts(config: DataConfig, split: str) -> Iterator[str]:
    import datasets

    name, subset, revision, text_field = config.name, config.subset, config.revision, config.text_field or "text"
    assert name is not None  # `Source.needs`
    where = f'[data] hf data set {" ".join(part for part in (name, subset) if part)}, split "{split}"'
    if not Path(name).is_dir():
        _check_reachable(name, revision, where)
    rows: Iterator[dict[str, Any]]
    try:
        rows = iter(datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True))
        row = next(rows, None)
    except Exception as error:  # the library raises many types, also those of its HTTP client
        raise DataError(
            f"{where}: cannot be opened ({type(error).__name__}: {error}). Check name, subset, split and revision."
        ) from error
    count = 0
    while row is not None:
        text = row.get(text_field, row)
        if not isinstance(text, str | None):
            raise DataError(
                f'{where}: there is no text in the field "{text_field}"; the fields are {", ".join(sorted(row))}. '
                "Set text_field to the one that holds the text."
            )
        if text:
            yield text
        count += 1
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(
                f"{where}: the stream ended with an error after {count:,} rows ({type(error).__name__}: {error}). "
                "Prepare again, which continues."
            ) from error


def _check_reachable(name: str, revision: str | None, where: str) -> None:
    """Query the Hub once: without a network, `datasets` would retry for half a minute and print each attempt."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # `datasets` then uses only its cache
    try:
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return  # the Hub is reachable; `datasets` reports the error
    except Exception as error:  # the library's HTTP client differs between versions, and so do its exceptions
        raise DataError(
            f"{where}: the Hugging Face Hub cannot be reached ({error}). "
            'Prepare on a machine with a network, or download text files and use source = "text".'
        ) from error
