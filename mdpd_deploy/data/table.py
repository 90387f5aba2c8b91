"""Tables of the user's own: CSV, TSV, JSON, JSONL, Parquet and Excel with named columns.

Those that are text may be packed (`.csv.gz`). CSV and TSV are read as text, so that `NA`, `no` or `01` stay what was written. A TSV may be
unquoted, as GLUE's are: if the fields that begin with `"` are not all well-formed quoted fields
and every line has the right number of tabs, quotes are plain characters.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from mdpd_deploy.data.cells import kind_of, label_cells, text_cells
from mdpd_deploy.data.examples import Field, Raw, joined
from mdpd_deploy.data.table_file import most_bytes, read_text, suffixes, too_large
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry

_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Table:
    """Named columns of one file.

    Attributes:
        path: The file.
        columns: Column name to cells, in file order.
        lines: The place of each row, counted as an editor does where the format has lines.
        unit: What `lines` counts, "line" or "row".
        left_out: (reason, name) of what the file holds besides.
    """

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    unit: str
    left_out: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, index: int) -> str:
        """Name a row for a message, e.g. `reviews.csv line 7`."""
        return f"{self.path} {self.unit} {self.lines[index]}"

    def column(self, name: str, option: str) -> list[Any]:
        """Return a column; raises `UserError` naming the columns there are."""
        if name in self.columns:
            return self.columns[name]
        near = get_close_matches(name, self.columns, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{self.path} has no column {name!r} for {option}.{hint} "
            f"It has: {', '.join(self.columns)}."
        )

    def texts(self, name: str) -> list[str]:
        """Return a text column; raises `UserError` for a cell without text."""
        return text_cells(self.column(name, "--text"), name, self.where)

    def labels(self, name: str) -> list[str]:
        """Return the label column as text, "" where one is missing; raises as `label_cells`."""
        return label_cells(self.column(name, "--label"), name, self.where)

    def pictures(self, name: str, *, must_exist: bool) -> list[Raw]:
        """Return a column of image paths, relative ones taken from the table's folder."""
        found: list[Raw] = []
        for index, cell in enumerate(self.column(name, "--image")):
            if not isinstance(cell, str) or not cell.strip():
                raise UserError(
                    f"{self.where(index)}: column {name!r} must hold the path of a picture, "
                    f"found {kind_of(cell)}: correct the row or remove it."
                )
            path = self.path.parent / cell.strip()
            if must_exist and not path.is_file():
                raise UserError(
                    f"{self.where(index)}: the picture {path} does not exist: correct the path "
                    "(relative ones start at the table's folder)."
                )
            found.append(path)
        return found


# a reader takes the file, and the encoding of its text (None = UTF-8) where it is text
FORMATS: Registry[Callable[[Path, str | None], Table]] = Registry("table format")
TEXTS = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson"})  # those that may be packed


def is_table(path: Path) -> bool:
    """Tell by its ending whether a file is a table that can be read."""
    return _format(path) is not None


def is_text_table(path: Path) -> bool:
    """Tell by its ending whether a file is a table that has an encoding."""
    return _format(path) in TEXTS


def table_stem(path: Path) -> str:
    """Return a table's name without its endings."""
    return path.name[: -len("".join(suffixes(path)))]


def _format(path: Path) -> str | None:
    """Return the ending that says how a file is read; None if it is no table."""
    first, *packed = suffixes(path) or ("",)
    return first if first in FORMATS and (not packed or first in TEXTS) else None


def read_table(path: Path, encoding: str | None = None) -> Table:
    """Read a table by its ending.

    Args:
        path: The file.
        encoding: Of a text table; None = UTF-8. Parquet and Excel say their own.

    Raises:
        UserError: If the file is missing, of another format, damaged, or has no rows.
    """
    if not path.is_file():
        raise UserError(f"the table {path} does not exist: correct the path.")
    ending = _format(path)
    if ending is None:
        raise UserError(
            f"{path} is not a table that can be read: expected one of {', '.join(FORMATS)}, the "
            "texts among them also with .gz."
        )
    try:
        table = FORMATS[ending](path, encoding)
    except OSError as err:
        raise UserError(f"{path} cannot be read ({err.strerror or err}).") from err
    if not len(table):
        raise UserError(f"{path} holds no rows: give a table with at least one.")
    return table


def read_inputs(
    path: Path, columns: Sequence[str], field: Field, encoding: str | None = None
) -> list[Raw]:
    """Read only the inputs of a table, for `predict`: labels need not be there.

    Args:
        path: The table.
        columns: The columns of training (`TaskData.columns`), one or, for pairs, two.
        field: text or image.
        encoding: Of a text table; None = UTF-8.

    Raises:
        UserError: If a column is missing or a cell is empty.
    """
    table = read_table(path, encoding)
    if field == "image":
        return table.pictures(columns[0], must_exist=True)
    return table_texts(table, columns)


def table_texts(table: Table, columns: Sequence[str]) -> list[Raw]:
    """Return sentences of one column, or pairs of two."""
    return joined([table.texts(name) for name in columns])


@FORMATS.register(".csv")
def _read_csv(path: Path, encoding: str | None) -> Table:
    text = read_text(path, encoding)
    header = io.StringIO(text, newline="").readline()
    delimiter = ";" if "," not in header and ";" in header else ","
    return _read_delimited(path, text, delimiter, csv.QUOTE_MINIMAL)


@FORMATS.register(".tsv")
def _read_tsv(path: Path, encoding: str | None) -> Table:
    text = read_text(path, encoding)
    lines = [line for line in _lines(text) if line]
    width = lines[0].count("\t") if lines else 0
    fits = all(line.count("\t") == width for line in lines)
    quoted = (field for line in lines for field in line.split("\t") if field[:1] == '"')
    plain = fits and not all(_QUOTED_FIELD.fullmatch(field) for field in quoted)
    return _read_delimited(path, text, "\t", csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)


def _lines(text: str) -> list[str]:
    """Return the lines of a text, whichever of CR LF, LF and CR ends them."""
    return io.StringIO(text, newline=None).read().split("\n")


def _read_delimited(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> Table:
    csv.field_size_limit(2**31 - 1)  # whole documents are longer than the default 131072
    rows: list[list[str]] = []
    lines: list[int] = []
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        start = reader.line_num + 1
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as err:
        raise UserError(
            f"{path} line {reader.line_num} is not well-formed ({err}): "
            "put fields with quotes or separators in quotes, and double inner quotes."
        ) from None
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise UserError(
                f"{path} line {line} has {len(row)} fields, the header has {len(header)}: "
                "put fields that contain the separator in quotes."
            )
    return table_of(path, header, rows, lines, "line")


def table_of(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    lines: Sequence[int],
    unit: str,
    left_out: tuple[tuple[str, str], ...] = (),
) -> Table:
    """Return a table of rows that are as long as the header; raises `UserError` for equal names."""
    if doubles := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path} has two columns named {doubles[0]!r}: rename one of them.")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return Table(path, columns, lines, unit, left_out)


@FORMATS.register(".jsonl", ".ndjson")
def _read_jsonl(path: Path, encoding: str | None) -> Table:
    return _json_lines(path, read_text(path, encoding))


@FORMATS.register(".json")
def _read_json(path: Path, encoding: str | None) -> Table:
    """Read an array of objects; many a `.json` holds an object a line instead."""
    text = read_text(path, encoding)
    if text.lstrip()[:1] != "[":
        return _json_lines(path, text)
    records = _parsed(text, str(path))
    return _records(path, records, range(1, len(records) + 1), "row")


def _json_lines(path: Path, text: str) -> Table:
    kept = [(number, line) for number, line in enumerate(_lines(text), start=1) if line.strip()]
    records = [_parsed(line, f"{path} line {number}") for number, line in kept]
    return _records(path, records, [number for number, _ in kept], "line")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        at = f", line {err.lineno}" if err.lineno > 1 else ""
        raise UserError(f"{where} is not JSON ({err.msg}{at}): correct it.") from None
    except RecursionError:
        raise UserError(
            f"{where} is nested too deeply: put plain values into the columns."
        ) from None
    except ValueError:  # the only other one: Python reads no number of so many digits
        raise UserError(f"{where} holds a number of thousands of digits: correct it.") from None


def _records(path: Path, records: list[Any], places: Sequence[int], unit: str) -> Table:
    for place, record in zip(places, records, strict=True):
        if not isinstance(record, dict):
            raise UserError(
                f"{path} {unit} {place} is {kind_of(record)}: each {unit} must be an object "
                'like {"text": "...", "label": "..."}.'
            )
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    return Table(path, columns, places, unit)


@FORMATS.register(".xlsx")
def _read_xlsx(path: Path, encoding: str | None) -> Table:
    from mdpd_deploy.data.xlsx import read_sheet

    return read_sheet(path)


@FORMATS.register(".parquet")
def _read_parquet(path: Path, encoding: str | None) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _check_growth(path, file.metadata)
        table = file.read()
    except pyarrow.ArrowException as err:
        reason = str(err).splitlines()[0]
        raise UserError(f"{path} is not a readable Parquet file ({reason}).") from err
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(path, columns, range(1, table.num_rows + 1), "row")


def _check_growth(path: Path, facts: Any) -> None:
    """Refuse a Parquet file that would unpack to far more than it holds."""
    groups = [facts.row_group(index).total_byte_size for index in range(facts.num_row_groups)]
    if max(sum(groups), facts.num_rows * facts.num_columns) > most_bytes(path):
        raise too_large(path)
