"""Source ``python-library``: text that is on every machine that can run this.

The standard library of the running interpreter is taken alone where it holds enough text. Interpreters that come
without their test suite (many distributions) hold about 10 MB; there, files of installed packages are added until
there is enough. So with a complete interpreter the text depends on its version alone.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from scaling.data.sources.documents import Document, content_digest
from scaling.errors import DataError

SUFFIXES = (".py", ".rst", ".md")

ENOUGH_BYTES = 20_000_000
"""Text wanted before packages are looked at: the demo trains on some 12 MB, and 5 % are held out."""

LARGEST_PACKAGE_FILE = 256 * 1024
"""Larger files of packages are mostly generated tables; the standard library has none but its documentation topics."""

NOT_TEXT = ("encodings", "_sysconfigdata")
"""Standard library left out: 1.4 MB of code pages, and the record of the build machine, which differs by build."""

FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


def documents() -> Iterator[Document]:
    """Each distinct file once, in the order of the hashes of the names, so that any prefix is a sample of the whole.

    Files that are not UTF-8 (a handful of encoding tests) are left out, and so are empty ones.
    """
    files = find()
    total = sum(size for _, _, size in files)
    seen: set[bytes] = set()
    read = 0
    for _, path, size in files:
        read += size
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = content_digest(text)
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(text, None, read / total)


def find() -> list[tuple[str, Path, int]]:
    """Name within its root, path and size of each file, ordered by hash of the name.

    Raises:
        DataError: The interpreter has no library on disk (a frozen or zipped one).
    """
    library = Path(sysconfig.get_path("stdlib"))
    found = [file for file in _walk("", library) if not file[0].startswith(NOT_TEXT)]
    size = sum(size for _, _, size in found)
    for root in sorted({Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}):
        for name, path, bytes_ in sorted(_walk("packages/", root), key=_order):
            if size >= ENOUGH_BYTES:
                break
            if bytes_ <= LARGEST_PACKAGE_FILE:
                found.append((name, path, bytes_))
                size += bytes_
    if not found:
        raise DataError(
            f'[data] source "python-library": no {", ".join(SUFFIXES)} files under {library}. '
            'Use an interpreter whose library is on disk, or source = "text" with a path.'
        )
    return sorted(found, key=_order)


def _order(file: tuple[str, Path, int]) -> bytes:
    return hashlib.sha256(file[0].encode()).digest()


def _walk(prefix: str, root: Path) -> Iterator[tuple[str, Path, int]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - FOREIGN_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(SUFFIXES) and path.is_file():
                yield prefix + path.relative_to(root).as_posix(), path, path.stat().st_size
