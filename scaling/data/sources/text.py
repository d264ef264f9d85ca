"""Source ``text``: files on disk. A document is a plain text file, a JSON line or a row of a table."""

from __future__ import annotations

import contextlib
import glob
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from scaling.data.sources.documents import Document, Split
from scaling.data.sources.registry import DataConfig
from scaling.errors import DataError

MAX_ZSTD_WINDOW_BYTES = 2**31
"""Archives of text are often compressed with ``--long=31``."""

CHUNK_BYTES = 1 << 17
"""Compressed bytes that are decompressed at once: some 400 kB of text."""

FoundFile = tuple[Split | None, str, Path]
"""Published split of the file (None: divide by content), name without the folder, path."""


def inputs(config: DataConfig) -> list[str]:
    """Split, name and size of each file."""
    files = find(config.path or "", config.validation)
    return [f"{split}/{name} {file.stat().st_size}" for split, name, file in files]


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of `validation`, then those of `path`, each in the order of the file names.

    Empty and null texts are skipped.

    Raises:
        DataError: A file does not have the format of its suffix, or has no text field.
    """
    files = find(config.path or "", config.validation)
    total = sum(file.stat().st_size for _, _, file in files) or 1
    before = 0
    for split, _, file in files:
        read = READERS[_suffix(file)]
        with _read_errors(str(file)), file.open("rb") as raw:
            for text in read(raw, file, config.text_field or "text"):
                if text:
                    yield Document(text, split, min((before + raw.tell()) / total, 1.0))
        before += file.stat().st_size


@contextlib.contextmanager
def _read_errors(where: str) -> Iterator[None]:
    """Replace the exceptions of reading by a `DataError` that names the file or folder."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start:,} of a piece: {error.reason}). "
            "Convert it to UTF-8, or move it out of the folder."
        ) from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{where}: damaged or truncated ({error}). Download or compress the file again.") from None
    except OSError as error:
        inside = f"{error.filename} " if error.filename and error.filename not in where else ""
        raise DataError(
            f"{where}: {inside}cannot be read ({error.strerror or error}). Name files that you may read."
        ) from None


def find(path: str, validation: str | None = None) -> list[FoundFile]:
    """Files to read, validation first; files of a published validation set are excluded from training.

    Raises:
        DataError: A path does not exist, holds no file that can be read, or is a file with another suffix; or all files
            belong to the validation set.
    """
    if validation is None:
        return [(None, name, file) for name, file in _expand(path, "path")]
    held_out = _expand(validation, "validation")
    taken = {file.resolve() for _, file in held_out}
    training = [(name, file) for name, file in _expand(path, "path") if file.resolve() not in taken]
    if not training:
        raise DataError(
            f"[data] path {path}: every file in it is in the validation set {validation}, so none is left to train on. "
            "Name other files in path."
        )
    published: list[FoundFile] = [("validation", name, file) for name, file in held_out]
    return published + [("train", name, file) for name, file in training]


def plain_sizes(path: str, validation: str | None = None) -> list[tuple[Split | None, int]] | None:
    """Split and size of each file; None if one of them is not plain text."""
    files = find(path, validation)
    if any(READERS[_suffix(file)] is not _plain for _, _, file in files):
        return None
    return [(split, file.stat().st_size) for split, _, file in files]


def _expand(path: str, option: str) -> list[tuple[str, Path]]:
    """Name and path of each file of a file, folder or glob, ordered by name."""
    try:
        return _matches(path, option)
    except OSError as error:
        raise DataError(
            f"[data] {option} {path}: cannot be listed ({error.filename}: {error.strerror}). "
            "Name a folder that you may read."
        ) from None


def _matches(path: str, option: str) -> list[tuple[str, Path]]:
    known = ", ".join(READERS)
    root = Path(path)
    with _read_errors(f"[data] {option} {path}"):
        if root.is_file():
            if _suffix(root) not in READERS:
                raise DataError(f"[data] {option} {path}: the suffix {root.suffix!r} is not known. Accepted: {known}.")
            return [(root.name, root)]
        if root.is_dir():
            candidates = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*")]
        else:
            candidates = [(Path(match).name, Path(match)) for match in glob.glob(path, recursive=True)]  # noqa: PTH207
            if not candidates:
                raise DataError(
                    f"[data] {option} {path}: there is no such file or folder, and as a pattern it matches nothing. "
                    "Correct it; relative paths start at the campaign file's folder."
                )
        found = sorted((name, file) for name, file in candidates if _suffix(file) in READERS and file.is_file())
    if not found:
        raise DataError(
            f"[data] {option} {path}: it holds no file with an accepted suffix. Accepted suffixes: {known}."
        )
    return found


def _suffix(file: Path) -> str:
    compressed = file.suffix in (".zst", ".xz")
    return "".join(file.suffixes[-2:]) if compressed else file.suffix


def _plain(raw: IO[bytes], file: Path, text_field: str) -> Iterator[str]:
    yield raw.read().decode("utf-8-sig").replace("\r\n", "\n")


def _json_lines(raw: Iterable[bytes], file: Path, text_field: str) -> Iterator[str]:
    decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
    for number, line in enumerate(raw, start=1):
        if not line.strip():
            continue
        try:
            fields = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise DataError(
                f"{file}, line {number:,}: not a JSON object ({error}). Write one object per line, with its text in "
                f'"{text_field}".'
            ) from None
        if text_field not in fields:
            raise _no_field(f"{file}, line {number:,}", text_field, list(fields))
        try:
            yield msgspec.json.decode(fields[text_field], type=str | None) or ""
        except msgspec.DecodeError as error:
            raise DataError(
                f'{file}, line {number:,}: the field "{text_field}" is not a text ({error}). Set text_field to one that is.'
            ) from None


def _json_lines_zst(raw: IO[bytes], file: Path, text_field: str) -> Iterator[str]:
    import zstandard

    try:
        yield from _json_lines(_lines(_decompressed(raw)), file, text_field)
    except (zstandard.ZstdError, EOFError) as error:
        raise DataError(f"{file}: damaged or truncated ({error}). Download or compress the file again.") from None


def _decompressed(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompressed pieces of a zstd file of one or more frames.

    Raises:
        EOFError: The file is truncated, which the library's own reader does not report.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    frame = None
    while chunk := raw.read(CHUNK_BYTES):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("its last frame does not end")


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield b"".join(rest)


def _json_lines_xz(raw: IO[bytes], file: Path, text_field: str) -> Iterator[str]:
    with lzma.open(raw) as stream:
        yield from _json_lines(stream, file, text_field)


def _parquet(raw: IO[bytes], file: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(raw)) as table:
            if text_field not in table.schema_arrow.names:
                raise _no_field(str(file), text_field, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise DataError(
                            f'{file}: the column "{text_field}" holds {text!r:.40}, not a text. Set text_field to one that does.'
                        )
                    yield text or ""
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a valid Parquet file ({error}). Write or download it again.") from None


def _no_field(where: str, text_field: str, fields: list[str]) -> DataError:
    return DataError(
        f'{where}: there is no field "{text_field}"; the fields are {", ".join(sorted(fields)) or "none"}. '
        "Set text_field to the one that holds the text."
    )


READERS: dict[str, Callable[[IO[bytes], Path, str], Iterator[str]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _json_lines,
    ".jsonl.zst": _json_lines_zst,
    ".jsonl.xz": _json_lines_xz,
    ".parquet": _parquet,
}
