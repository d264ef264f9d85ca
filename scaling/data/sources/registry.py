"""Sources of text: the ``[data]`` table of a campaign, and the registry of sources that it names.

Reading a campaign file imports this module, so it imports nothing heavy; the module of a source is imported when the
source is first used. To add a source, write a function that yields documents and a row for `SOURCES`, or register the
row in an installed package under ``scaling_harness.sources`` (`scaling.registry`).
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from scaling.data.sources.documents import Document
from scaling.errors import DataError, UserError, shortened, unknown_name
from scaling.io import Positive, Strict
from scaling.registry import Registry

SOURCE_OPTIONS = ("path", "name", "subset", "split", "revision", "validation", "text_field")
"""Options of `DataConfig` that only some sources take."""

MAX_OPTION_CHARACTERS = 1024
"""Longest path that macOS accepts."""


class DataConfig(Strict, frozen=True):
    """The ``[data]`` table of a campaign: the text to train on, and how it is tokenized and split.

    Paths are used as they are; the reader of a file first resolves them against the file's folder (`resolved`).

    Raises:
        DataError: The source is unknown, an option that it needs is missing, or one that it does not take is given.
    """

    source: str = "python-library"
    """Row of `SOURCES`."""
    path: str | None = None
    """text: a file, a folder or a glob of .txt, .md, .jsonl, .jsonl.zst, .jsonl.xz and .parquet files."""
    name: str | None = None
    """hf: the data set's name on the Hugging Face Hub, or a local folder."""
    subset: str | None = None
    """hf: the data set's configuration, if it has several."""
    split: str | None = None
    """hf: the split to train on; default ``train``."""
    revision: str | None = None
    """hf: commit or tag, so that the same configuration always gives the same text."""
    validation: str | None = None
    """A published validation set; text: file, folder or glob, hf: split. Without it, part of the text is held out."""
    text_field: str | None = None
    """text, hf: the field that holds the text; default ``text``."""
    tokenizer: str = "bytes"
    """``bytes`` (vocabulary 256, 0 between documents) or the path of a tokenizers JSON file."""
    train_tokens: Positive | None = None
    """Stop after the document that reaches this many training tokens; None uses the whole text."""
    validation_fraction: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.05
    """Share to hold out without a published validation set: of the documents, chosen by a hash of their content; of each
    document's text, its end, if there are too few documents."""
    repeat: bool = False
    """Let a run that needs more tokens than there are train for several epochs, each in its own order."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DataError(f"[data] {unknown_name('source', self.source, SOURCES)}")
        row = SOURCES[self.source]
        for option in (*SOURCE_OPTIONS, "tokenizer"):
            _check_text(option, getattr(self, option))
        for option in SOURCE_OPTIONS:
            given = getattr(self, option) is not None
            if given and option not in row.takes:
                others = ", ".join(f'"{name}"' for name, other in SOURCES.items() if option in other.takes)
                raise DataError(
                    f'[data] source "{self.source}" does not take {option}; it takes '
                    f"{', '.join(sorted(row.takes)) or 'none of the options of a source'}. "
                    f"Remove {option}, or use source {others}."
                )
            if option in row.needs and not given:
                raise DataError(
                    f'[data] source "{self.source}" needs {option}, which is missing. Add: {option} = "..."'
                )

    def resolved(self, folder: Path) -> DataConfig:
        """This configuration with relative paths taken from `folder`, that of the campaign file."""

        def absolute(option: str, path: str) -> Path:
            try:
                return resolve_path(folder, path)
            except UserError as error:
                raise DataError(f"[data] {option} {error}") from None

        changes: dict[str, str] = {}
        if self.tokenizer != "bytes":
            changes["tokenizer"] = str(absolute("tokenizer", self.tokenizer))
        if self.path is not None:
            changes["path"] = str(absolute("path", self.path))
            if self.validation is not None:
                changes["validation"] = str(absolute("validation", self.validation))
        # A name is a folder next to the campaign file if there is one, and a data set of the Hub otherwise.
        if self.name is not None and _is_folder(local := absolute("name", self.name)):
            changes["name"] = str(local)
        return msgspec.structs.replace(self, **changes)


def resolve_path(folder: Path, path: str) -> Path:
    """A path that may be relative to `folder` or start with ``~``.

    Raises:
        DataError: There is no such user, or the operating system does not accept the path.
    """
    try:
        found = folder.resolve() / Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found.lstat()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f'"{shortened(path)}" cannot be read ({why}). Give another path.') from None
    return found


def _check_text(option: str, value: str | None) -> None:
    """Reject a value that is no path, name or field before a library or the terminal sees it."""
    if value is None:
        return
    if len(value) > MAX_OPTION_CHARACTERS:
        raise DataError(
            f"[data] {option}: {len(value):,} characters long, and at most {MAX_OPTION_CHARACTERS:,} are accepted. "
            "Shorten it."
        )
    if not value:
        raise DataError(f"[data] {option} is empty. Give a value, or remove the line.")
    if re.search(r"[\x00-\x1f\x7f-\x9f]", value):
        raise DataError(f"[data] {option}: {value!a:.80} holds a control character. Remove it.")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a part of the path is too long, or must not be read
        return False


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of `SOURCES`."""

    label: str
    """Name in help texts and reports."""
    documents: Callable[[DataConfig], Iterator[Document]]
    """Yields the documents in a fixed order; those of a published validation set come first."""
    inputs: Callable[[DataConfig], list[str]]
    """Returns what the text depends on besides the options, such as sizes of files or a version. It is cheap, its
    result contains no paths, and it raises `DataError` if the inputs do not exist, so that a plan fails early."""
    takes: frozenset[str] = frozenset()
    """Those of `SOURCE_OPTIONS` that may be given."""
    needs: frozenset[str] = frozenset()
    """Those of `takes` that must be given."""


def _imported(module: str, function: str) -> Callable[[DataConfig], Any]:
    """A function of a source's module, which is imported by the first call."""
    return lambda config: getattr(importlib.import_module(f"scaling.data.sources.{module}"), function)(config)


SOURCES: Registry[Source] = Registry(
    "source",
    "sources",
    {
        "python-library": Source(
            label="Python source text of the running interpreter's standard library",
            documents=_imported("stdlib", "documents"),
            inputs=_imported("stdlib", "inputs"),
        ),
        "text": Source(
            label="text files on disk",
            documents=_imported("text", "documents"),
            inputs=_imported("text", "inputs"),
            takes=frozenset({"path", "validation", "text_field"}),
            needs=frozenset({"path"}),
        ),
        "hf": Source(
            label="a Hugging Face data set, streamed",
            documents=_imported("huggingface", "documents"),
            inputs=_imported("huggingface", "inputs"),
            takes=frozenset({"name", "subset", "split", "revision", "validation", "text_field"}),
            needs=frozenset({"name"}),
        ),
    },
)


def optional_package(package: str, purpose: str) -> None:
    """Import a package of the extra ``data``."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}). "
            "Install the extra: pip install 'scaling-harness[data]'."
        ) from None
