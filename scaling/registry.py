"""Rows by name: the built-in ones, and those that installed packages add as entry points. Imports no torch.

A package adds an optimizer without a change to this repository by one line of its pyproject.toml::

    [project.entry-points."scaling_harness.optimizers"]
    lion = "my_package.lion:LION"

Groups: ``optimizers``, ``models``, ``sources``, ``laws``, ``law_families``, ``figures``, ``checks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from scaling.errors import UserError, unknown_name

Row = TypeVar("Row")

PREFIX = "scaling_harness."


class Registry(MutableMapping[str, Row]):
    """Rows by name, in the order in which help and tables list them.

    A package's row is imported by the first read, not with the registry: its module imports the registry's module for the
    type of a row, in either order.

    Args:
        kind: What a row is, as an error calls it: ``optimizer``.
        group: Entry point group behind `PREFIX`.
        rows: The built-in rows.

    Raises:
        UserError: An installed package registers a row under a name that is taken, or, at the first read, one that cannot
            be imported.
    """

    def __init__(self, kind: str, group: str, rows: Mapping[str, Row]) -> None:
        self.kind = kind
        self._rows = dict(rows)
        self._to_load: list[EntryPoint] = []
        for point in entry_points(group=PREFIX + group):
            if point.name in [*self._rows, *(other.name for other in self._to_load)]:
                raise UserError(
                    f'package {_package(point)} registers {kind} "{point.name}", and that name is taken. Rename it in its '
                    f'entry points "{PREFIX}{group}", or uninstall the package.'
                )
            self._to_load.append(point)

    def _loaded(self) -> dict[str, Row]:
        """All rows, those of packages imported."""
        while self._to_load:
            point = self._to_load.pop(0)  # first, because its module may read this registry
            try:
                self._rows[point.name] = point.load()
            except (ImportError, AttributeError) as error:
                self._to_load.insert(0, point)
                raise UserError(
                    f'package {_package(point)} registers {self.kind} "{point.name}" as {point.value}, which cannot be '
                    f"imported ({error}). Fix or uninstall the package."
                ) from error
        return self._rows

    def __getitem__(self, name: str) -> Row:
        return self._loaded()[name]

    def __setitem__(self, name: str, row: Row) -> None:
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def row(self, name: str) -> Row:
        """The row of a name; the error for an unknown one lists the known ones and the nearest."""
        if name not in self:
            raise UserError(unknown_name(self.kind, name, self))
        return self[name]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
