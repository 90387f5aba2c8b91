"""rich's console, for words that may be a stranger's (see `shown.py`)."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from mdpd_deploy.text import shown


class Console(RichConsole):
    """A console that spells out what is not visible and reads no markup, unless asked to."""

    def __init__(self, *, markup: bool = False, **options: Any) -> None:
        super().__init__(markup=markup, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is printed; the console's own control codes stay."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else shown(text), style, control)
