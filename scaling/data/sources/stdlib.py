"""Source ``python-library``: text that exists on every machine that can run this program.

It is the standard library of the running interpreter if that holds enough text. Many distributions omit the
interpreter's test suite, which leaves about 10 MB; then files of installed packages are added until there is enough.
With a complete interpreter the text depends only on its version.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from scaling.data.sources.documents import Document, content_digest
from scaling.data.sources.registry import DataConfig
from scaling.errors import DataError

SUFFIXES = (".py", ".rst", ".md")

MIN_TEXT_BYTES = 20_000_000
"""Text below which packages are added. The demo trains on some 12 MB, and 5 % are held out."""

MAX_PACKAGE_FILE_BYTES = 256 * 1024
"""Larger files of packages are mostly generated tables."""

EXCLUDED_LIBRARY = ("encodings", "_sysconfigdata")
"""Parts of the standard library that are excluded: 1.4 MB of code pages, and a file that differs between builds."""

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


def inputs(config: DataConfig) -> list[str]:
    """Name and version of the interpreter."""
    return [f"{platform.python_implementation()} {platform.python_version()}"]


def documents(config: DataConfig) -> Iterator[Document]:
    """Each distinct file once, ordered by the hash of its name, so that any prefix is a sample of the whole.

    Empty files, and the few test files that are not UTF-8, are skipped.
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
    """Name relative to its root, path and size of each file, ordered by hash of the name."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [file for file in _walk("", library) if not file[0].startswith(EXCLUDED_LIBRARY)]
    size = sum(size for _, _, size in found)
    for root in sorted({Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}):
        for name, path, bytes_ in sorted(_walk("packages/", root), key=_order):
            if size >= MIN_TEXT_BYTES:
                break
            if bytes_ <= MAX_PACKAGE_FILE_BYTES:
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
        subfolders[:] = sorted(set(subfolders) - EXCLUDED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(SUFFIXES) and path.is_file():
                yield prefix + path.relative_to(root).as_posix(), path, path.stat().st_size
