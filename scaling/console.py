"""The console of all verbs, which shows text from files without interpreting markup or control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from scaling.errors import plain


class _PlainConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of a renderable, with control characters replaced in texts and kept in rich's own control codes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


def console(**options: Any) -> Console:
    """A console that ignores markup, emoji codes and control characters in texts.

    Args:
        options: Further options of `rich.console.Console`.
    """
    return _PlainConsole(markup=False, emoji=False, **options)
