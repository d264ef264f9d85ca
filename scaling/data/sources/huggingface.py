"""Source ``hf``: a Hugging Face data set, streamed, so that nothing but the shards is kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scaling.data.sources.documents import Document, Split
from scaling.errors import DataError


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
    rows: Iterator[dict[str, Any]]
    try:
        rows = iter(datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True))
        row = next(rows, None)
    except Exception as error:  # the library raises a dozen kinds, network ones among them
        raise DataError(
            f"{where}: cannot be opened ({type(error).__name__}: {error}). "
            "Check name, subset, split and revision, and whether this machine reaches the Hub."
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
