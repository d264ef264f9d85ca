"""Rows by name: the built-in ones, and those that installed packages add as entry points. Imports no torch.

A package adds an optimizer without a change to this repository by one line of its pyproject.toml::

    [project.entry-points."scaling_harness.optimizers"]
    lion = "my_package.lion:LION"

Groups: ``optimizers``, ``models``, ``sources``, ``laws``, ``law_families``, ``figures``, ``checks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from scaling.errors import UserError, unknown_name

Row = TypeVar("Row")

PREFIX = "scaling_harness."


class Registry(dict[str, Row]):
    """Rows by name, in the order in which help and tables list them.

    Args:
        kind: What a row is, as an error calls it: ``optimizer``.
        group: Entry point group behind `PREFIX`.
        rows: The built-in rows.

    Raises:
        UserError: An installed package registers a row that cannot be imported, or under a name that is taken.
    """

    def __init__(self, kind: str, group: str, rows: Mapping[str, Row]) -> None:
        super().__init__(rows)
        self.kind = kind
        for point in entry_points(group=PREFIX + group):
            package = point.dist.name if point.dist is not None else point.value
            if point.name in self:
                raise UserError(
                    f'package {package} registers {kind} "{point.name}", and that name is taken. Rename it in its '
                    f'entry points "{PREFIX}{group}", or uninstall the package.'
                )
            try:
                self[point.name] = point.load()
            except (ImportError, AttributeError) as error:
                raise UserError(
                    f'package {package} registers {kind} "{point.name}" as {point.value}, which cannot be imported '
                    f"({error}). Fix or uninstall the package."
                ) from error

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            UserError: There is no such row; the sentence lists the known ones and the nearest.
        """
        if name not in self:
            raise UserError(unknown_name(self.kind, name, self))
        return self[name]
