"""Source ``text``: files on disk, one document a plain text file, a JSON line or a row of a table."""

from __future__ import annotations

import contextlib
import glob
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from scaling.data.sources.documents import Document, Split
from scaling.errors import DataError

WINDOW_LOG = 31
"""Largest zstd window taken, 2 GiB: text archives are often packed with ``--long``."""

CHUNK_BYTES = 1 << 17
"""Packed bytes unpacked at once: some 400 kB of text."""

FoundFile = tuple[Split | None, str, Path]
"""Half that a published split gives the file (None: split by content), name without the folder, path."""


def documents(path: str, *, validation: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """The documents of `validation`, then those of `path`, each in the order of the file names.

    An empty or null text is no document.

    Raises:
        DataError: A file cannot be read as what its suffix says, or has no text field.
    """
    files = find(path, validation)
    total = sum(file.stat().st_size for _, _, file in files) or 1
    before = 0
    for half, _, file in files:
        read = READERS[_suffix(file)]
        with _refusing(str(file)), file.open("rb") as raw:
            for text in read(raw, file, text_field):
                if text:
                    yield Document(text, half, min((before + raw.tell()) / total, 1.0))
        before += file.stat().st_size


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn what reading raises into a `DataError` that names the file or folder."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start:,} of a piece: {error.reason}). "
            "Convert it to UTF-8, or move it out of the folder."
        ) from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{where}: damaged or cut short ({error}). Fetch or pack the file again.") from None
    except OSError as error:
        inside = f"{error.filename} " if error.filename and error.filename not in where else ""
        raise DataError(
            f"{where}: {inside}cannot be read ({error.strerror or error}). "
            "Name text files in a folder that you may read."
        ) from None


def find(path: str, validation: str | None = None) -> list[FoundFile]:
    """Files to read, validation first; those of a published validation set are never in training.

    Raises:
        DataError: A path does not exist, holds no file that can be read, or is a file with another suffix; or all files
            are the validation set's.
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
    halves: list[FoundFile] = [("validation", name, file) for name, file in held_out]
    return halves + [("train", name, file) for name, file in training]


def plain_sizes(path: str, validation: str | None = None) -> list[tuple[Split | None, int]] | None:
    """Bytes of each file of plain text; None where a file holds its text in other forms."""
    files = find(path, validation)
    if any(READERS[_suffix(file)] is not _plain for _, _, file in files):
        return None
    return [(half, file.stat().st_size) for half, _, file in files]


def _expand(path: str, option: str) -> list[tuple[str, Path]]:
    """Name and path of each file that a file, folder or glob stands for, ordered by name."""
    try:
        return _matches(path, option)
    except OSError as error:
        raise DataError(
            f"[data] {option} {path}: cannot be listed ({error.filename}: {error.strerror}). "
            "Name a folder of text files that you may read."
        ) from None


def _matches(path: str, option: str) -> list[tuple[str, Path]]:
    known = ", ".join(READERS)
    root = Path(path)
    with _refusing(f"[data] {option} {path}"):
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
                    "Relative paths are taken from the campaign file's folder."
                )
        found = sorted((name, file) for name, file in candidates if _suffix(file) in READERS and file.is_file())
    if not found:
        raise DataError(f"[data] {option} {path}: holds no file that can be read. Accepted suffixes: {known}.")
    return found


def _suffix(file: Path) -> str:
    packed = file.suffix in (".zst", ".xz")
    return "".join(file.suffixes[-2:]) if packed else file.suffix


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
                f"{file}, line {number:,}: not a JSON object ({error}). Each line holds one, with its text in "
                f'"{text_field}".'
            ) from None
        if text_field not in fields:
            raise _no_field(f"{file}, line {number:,}", text_field, list(fields))
        try:
            yield msgspec.json.decode(fields[text_field], type=str | None) or ""
        except msgspec.DecodeError as error:
            raise DataError(
                f'{file}, line {number:,}: the field "{text_field}" is not a text ({error}). Set text_field to one.'
            ) from None


def _json_lines_zst(raw: IO[bytes], file: Path, text_field: str) -> Iterator[str]:
    import zstandard

    try:
        yield from _json_lines(_lines(_unpacked(raw)), file, text_field)
    except (zstandard.ZstdError, EOFError) as error:
        raise DataError(f"{file}: damaged or cut short ({error}). Fetch or pack the file again.") from None


def _unpacked(raw: IO[bytes]) -> Iterator[bytes]:
    """Pieces of a zstd file of one or more frames; the library's own reader takes a file cut short for a whole one."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=2**WINDOW_LOG)
    frame = None
    while packed := raw.read(CHUNK_BYTES):
        while packed:
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data if frame.eof else b""
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
                            f'{file}: the column "{text_field}" holds {text!r:.40}, not a text. Set text_field to one.'
                        )
                    yield text or ""
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a Parquet file that can be read ({error}). Write or fetch it again.") from None


def _no_field(where: str, text_field: str, fields: list[str]) -> DataError:
    return DataError(
        f'{where}: there is no field "{text_field}"; it has {", ".join(sorted(fields)) or "none"}. '
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
