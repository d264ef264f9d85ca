"""Where text comes from: a campaign's ``[data]`` table, and the table of sources that it names.

Reading a campaign file imports this module, so nothing heavy is imported here; a source imports what it needs when it
is read. To add a source, write a function that yields documents and give it a row in `SOURCES`.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from scaling.data.sources.documents import Document
from scaling.errors import DataError, UserError, shortened, unknown_name
from scaling.io import Positive, Strict


class DataConfig(Strict, frozen=True):
    """Which text a campaign trains on and how it is cut into tokens: the whole of its ``[data]`` table.

    Paths are taken as they stand; whoever read them from a file resolves them against that file's folder first
    (`resolved`).

    Raises:
        DataError: The source is not known, lacks an option it needs, or is given one that it does not take.
    """

    source: str = "python-library"
    """Row of `SOURCES`."""
    path: str | None = None
    """text: a file, a folder or a glob of .txt, .md, .jsonl, .jsonl.zst, .jsonl.xz and .parquet files."""
    name: str | None = None
    """hf: the data set's name on the Hugging Face Hub, or a local folder."""
    subset: str | None = None
    """hf: the data set's configuration, where it has several."""
    split: str | None = None
    """hf: the split to train on; ``train`` when not given."""
    revision: str | None = None
    """hf: commit or tag, so that the same wish stays the same text."""
    validation: str | None = None
    """A published validation set: text: file, folder or glob; hf: split. Without it, part of the text is held out."""
    text_field: str | None = None
    """text, hf: the field that holds the text; ``text`` when not given."""
    tokenizer: str = "bytes"
    """``bytes`` (vocabulary 256, 0 between documents) or the path of a tokenizers JSON file."""
    train_tokens: Positive | None = None
    """Stop after the document that reaches this many training tokens; None takes all there is."""
    validation_fraction: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.05
    """Share held out where no published validation set is named: of the documents, chosen by a hash of their content; of
    the text of each document, its end, where there are too few to choose from."""
    repeat: bool = False
    """Let a run that needs more tokens than there are go over them again, each epoch in its own order."""

    def __post_init__(self) -> None:
        """Refuse options that the source does not take, and missing ones that it needs."""
        row = SOURCES.get(self.source)
        if row is None:
            raise DataError(f"[data] {unknown_name('source', self.source, SOURCES)}")
        for option in (*SOURCE_OPTIONS, "tokenizer"):
            _check_text(option, getattr(self, option))
        for option in SOURCE_OPTIONS:
            given = getattr(self, option) is not None
            if given and option not in row.takes:
                takers = ", ".join(f'"{name}"' for name, other in SOURCES.items() if option in other.takes)
                raise DataError(
                    f'[data] source "{self.source}" does not take {option}; it takes '
                    f"{', '.join(sorted(row.takes)) or 'none of the options of a source'}. "
                    f"Remove {option}, or use source {takers}."
                )
            if option in row.needs and not given:
                raise DataError(
                    f'[data] source "{self.source}" needs {option}, and it is missing. Add: {option} = "..."'
                )

    def resolved(self, folder: Path) -> DataConfig:
        """The same wish with relative paths taken from `folder`, the one that holds the campaign file."""

        def absolute(option: str, path: str) -> Path:
            try:
                return beside(folder, path)
            except UserError as error:
                raise DataError(f"[data] {option} {error}") from None

        changes: dict[str, str] = {}
        if self.tokenizer != "bytes":
            changes["tokenizer"] = str(absolute("tokenizer", self.tokenizer))
        if self.path is not None:
            changes["path"] = str(absolute("path", self.path))
            if self.validation is not None:
                changes["validation"] = str(absolute("validation", self.validation))
        # A data set that is a folder beside the campaign is that folder; any other name is the Hub's.
        if self.name is not None and _is_folder(local := absolute("name", self.name)):
            changes["name"] = str(local)
        return msgspec.structs.replace(self, **changes)


def beside(folder: Path, path: str) -> Path:
    """A path of a file in `folder`: relative ones start there, and ``~`` is a home.

    Raises:
        DataError: There is no such user, or the system takes no such path.
    """
    try:
        found = folder.resolve() / Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found.lstat()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f'"{shortened(path)}" cannot be read ({why}). Write another path.') from None
    return found


SOURCE_OPTIONS = ("path", "name", "subset", "split", "revision", "validation", "text_field")
"""Options that belong to some sources and not to others; the rest of `DataConfig` is common to all."""


LONGEST = 1024
"""Characters of a path; macOS takes no longer one."""


def _check_text(option: str, value: str | None) -> None:
    """Refuse what no path, name or field is, before a library or the terminal meets it."""
    if value is None:
        return
    if len(value) > LONGEST:
        raise DataError(
            f"[data] {option}: {len(value):,} characters long, and at most {LONGEST:,} are accepted. Shorten it."
        )
    if not value:
        raise DataError(f"[data] {option} is empty. Name something, or remove the line.")
    if re.search(r"[\x00-\x1f\x7f-\x9f]", value):
        raise DataError(f"[data] {option}: {value!a:.80} holds a control character. Write it without.")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a part of it is too long for a file's name, or may not be looked into
        return False


@dataclass(frozen=True, kw_only=True)
class Source:
    """One row of `SOURCES`."""

    label: str
    """For help texts and reports."""
    documents: Callable[[DataConfig], Iterator[Document]]
    """The documents in a fixed order; the published validation set, where there is one, comes first."""
    inputs: Callable[[DataConfig], list[str]]
    """What the text depends on besides the options, cheaply: names and sizes of files, a version. No paths.

    Raises `DataError` when the inputs are not there, so a plan can refuse before anything is trained.
    """
    takes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()


def _library_documents(config: DataConfig) -> Iterator[Document]:
    from scaling.data.sources.stdlib import documents

    return documents()


def _library_inputs(config: DataConfig) -> list[str]:
    return [f"{platform.python_implementation()} {platform.python_version()}"]


def _text_documents(config: DataConfig) -> Iterator[Document]:
    from scaling.data.sources.text import documents

    assert config.path is not None  # `needs` has seen to it
    return documents(config.path, validation=config.validation, text_field=config.text_field or "text")


def _text_inputs(config: DataConfig) -> list[str]:
    from scaling.data.sources.text import find

    assert config.path is not None
    files = find(config.path, config.validation)
    return [f"{half}/{name} {file.stat().st_size}" for half, name, file in files]


def _hub_documents(config: DataConfig) -> Iterator[Document]:
    from scaling.data.sources.huggingface import documents

    assert config.name is not None
    return documents(
        config.name,
        subset=config.subset,
        split=config.split or "train",
        validation=config.validation,
        revision=config.revision,
        text_field=config.text_field or "text",
    )


def _hub_inputs(config: DataConfig) -> list[str]:
    from scaling.data.sources.huggingface import check_name

    assert config.name is not None
    check_name(config.name)
    fields = (config.name, config.subset, config.split or "train", config.revision, config.validation)
    return [str(field) for field in fields]


SOURCES: dict[str, Source] = {
    "python-library": Source(
        label="Python source text of the running interpreter's standard library",
        documents=_library_documents,
        inputs=_library_inputs,
    ),
    "text": Source(
        label="text files on disk",
        documents=_text_documents,
        inputs=_text_inputs,
        takes=frozenset({"path", "validation", "text_field"}),
        needs=frozenset({"path"}),
    ),
    "hf": Source(
        label="a Hugging Face data set, streamed",
        documents=_hub_documents,
        inputs=_hub_inputs,
        takes=frozenset({"name", "subset", "split", "revision", "validation", "text_field"}),
        needs=frozenset({"name"}),
    ),
}


def optional_package(package: str, purpose: str) -> None:
    """Refuse with the remedy when a package of the extra ``data`` is missing."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}). "
            "Install the extra: pip install 'scaling-harness[data]'."
        ) from None
