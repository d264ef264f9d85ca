"""Source ``hf``: a Hugging Face data set, streamed, so that nothing but the shards is kept on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.data.sources.documents import Document, Split
from scaling.errors import DataError

ANSWER_SECONDS = 10.0
"""How long the Hub may take to answer before it counts as out of reach."""


def check_name(name: str) -> None:
    """Refuse what is neither a folder nor a name that the Hub can have.

    Raises:
        DataError: It is neither.
    """
    if Path(name).is_absolute():
        # `datasets` never comes to the end of the kernel's own file systems.
        if not Path(name).is_dir() or Path(name).parts[1] in ("proc", "sys"):
            raise DataError(
                f"[data] name {name}: there is no folder of this name that can hold data. "
                "Name one that holds data files, or a data set of the Hub."
            )
    elif not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name, re.ASCII):
        raise DataError(
            f"[data] name {name}: there is no such folder, and data sets of the Hub are called OWNER/NAME, in letters, "
            "digits, -, _ and ., at most 96 each. Correct the name."
        )


def documents(
    name: str,
    *,
    subset: str | None = None,
    split: str = "train",
    validation: str | None = None,
    revision: str | None = None,
    text_field: str = "text",
) -> Iterator[Document]:
    """The documents of the split `validation`, then those of `split`, in the order of the data set.

    An empty or null text is no document.

    Raises:
        DataError: The extra is not installed, the data set or split cannot be opened, or there is no text field.
    """
    from scaling.data.sources.registry import optional_package

    optional_package("datasets", f'[data] source "hf" ({name})')
    parts: list[tuple[str, Split | None]] = [(split, None)]
    if validation is not None:
        if validation == split:
            raise DataError(f'[data] validation "{validation}" is the split that is trained on. Name another split.')
        parts = [(validation, "validation"), (split, "train")]
    for part, half in parts:
        for text in _texts(name, subset, part, revision, text_field):
            yield Document(text, half, None)


def _texts(name: str, subset: str | None, split: str, revision: str | None, text_field: str) -> Iterator[str]:
    import datasets

    where = f'[data] hf data set {" ".join(part for part in (name, subset) if part)}, split "{split}"'
    if not Path(name).is_dir():
        _check_reachable(name, revision, where)
    rows: Iterator[dict[str, Any]]
    try:
        rows = iter(datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True))
        row = next(rows, None)
    except Exception as error:  # the library raises a dozen kinds, network ones among them
        raise DataError(
            f"{where}: cannot be opened ({type(error).__name__}: {error}). Check name, subset, split and revision."
        ) from error
    count = 0
    while row is not None:
        text = row.get(text_field, row)
        if not isinstance(text, str | None):
            raise DataError(
                f'{where}: there is no text in the field "{text_field}"; it has {", ".join(sorted(row))}. '
                "Set text_field to the one that holds the text."
            )
        if text:
            yield text
        count += 1
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(
                f"{where}: the stream broke off after {count:,} rows ({type(error).__name__}: {error}). "
                "Prepare again: it goes on from what is written."
            ) from error


def _check_reachable(name: str, revision: str | None, where: str) -> None:
    """Ask the Hub once, since `datasets` retries for half a minute, and prints each try, where there is no network."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # then `datasets` looks into its cache and tries nothing else
    try:
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=ANSWER_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return  # the Hub has answered, or the name is none of its: `datasets` says what is wrong
    except Exception as error:  # of the library's HTTP client, which has changed between its versions
        raise DataError(
            f"{where}: the Hugging Face Hub cannot be reached ({error}). "
            'Prepare on a machine with network, or download text files and use source = "text".'
        ) from error
