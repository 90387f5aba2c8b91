"""rich's console and tables, for words that may be a stranger's (see `text.shown`)."""

from collections.abc import Container, Iterable, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

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


def print_table(
    title: str | None,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    bold: Container[str] = (),
    right: bool = False,
) -> Console:
    """Print a table whose cells are never cut, and return the console for what stands below it.

    Args:
        title: Above it; None for none.
        headings: Empty texts give a table without a head.
        rows: Cells; a row may be shorter than the others.
        bold: First cells of the rows that stand out.
        right: Align all columns but the first to the right.
    """
    table = Table(title=title, show_header=any(headings))
    for index, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if right and index else "left")
    for row in rows:
        cells = [Text(shown(cell)) for cell in row]  # so that widths are those of what is shown
        table.add_row(*cells, style="bold" if row[0] in bold else None)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    return console
