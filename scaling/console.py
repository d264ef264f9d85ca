"""The console of every verb: names and titles come from files of anybody, and are shown as they stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from scaling.errors import plain


class _PlainConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of a renderable: a control character of a text is shown, those of rich itself pass."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


def console(**options: Any) -> Console:
    """A console without markup and emoji codes, for which control characters in a text have no effect.

    Args:
        options: Further ones of `rich.console.Console`.
    """
    return _PlainConsole(markup=False, emoji=False, **options)
