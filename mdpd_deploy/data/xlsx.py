"""The first sheet of an Excel workbook (`.xlsx`), read row by row through openpyxl.

Formulas give the values that Excel kept. Nothing of a workbook runs: macros, links and pictures are
not opened.
"""

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mdpd_deploy.data.table import Table, table_of
from mdpd_deploy.data.table_file import most_bytes, too_large
from mdpd_deploy.errors import UserError, missing_extra

MOST_ROWS = 1_048_576  # Excel's own limit; a file may claim any number
MOST_CELLS = 50_000_000


def read_sheet(path: Path) -> Table:
    """Return the first sheet of a workbook; the others are left out.

    Raises:
        UserError: If openpyxl is missing, or the file is no sound workbook or too large.
        OSError: If it cannot be read.
    """
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise missing_extra("openpyxl", "xlsx", f"reading {path}") from None
    try:
        _check_size(path)
        with warnings.catch_warnings():  # on parts of a workbook that it leaves out
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
            sheets = book.worksheets
            rows = list(_rows(path, sheets[0])) if sheets else []
            book.close()
    except (UserError, OSError):
        raise
    except Exception as err:  # damaged workbooks raise whatever a parser stumbles on
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise UserError(
            f"{path} is not a readable Excel workbook ({reason:.100}): save it as .xlsx or CSV."
        ) from err
    header = _header(path, rows[0][1]) if rows else []
    for number, cells in rows[1:]:
        if len(cells) > len(header):
            raise UserError(
                f"{path} row {number} has {len(cells)} cells, the header has {len(header)}: "
                "name every column in the first row."
            )
    padded = [[*cells, *[None] * (len(header) - len(cells))] for _, cells in rows[1:]]
    others = tuple(("sheets after the first", f"{path.name} {sheet.title}") for sheet in sheets[1:])
    return table_of(path, header, padded, [number for number, _ in rows[1:]], "row", others)


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as packed:
        if sum(part.file_size for part in packed.infolist()) > most_bytes(path):
            raise too_large(path)


def _rows(path: Path, sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    """Yield (row number, cells without the empty ones at the end) of rows that hold anything."""
    sheet.reset_dimensions()  # what the file says of its size need not be true
    seen = 0
    for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
        seen += len(cells)
        if number > MOST_ROWS or seen > MOST_CELLS:
            raise UserError(
                f"{path} has more than {MOST_ROWS:,} rows or {MOST_CELLS:,} cells: save it as CSV."
            )
        kept = list(cells)
        while kept and kept[-1] is None:
            kept.pop()
        if kept:
            yield number, kept


def _header(path: Path, cells: Sequence[Any]) -> list[str]:
    header = ["" if cell is None else str(cell).strip() for cell in cells]
    if "" in header:
        raise UserError(
            f"{path}: column {header.index('') + 1} has no name: the first row names every column."
        )
    return header
