"""The file that a measurement on a card leaves: written after every row, and gone on with.

    {schema, settings, machine, training: [row, …], latency: [row, …]}

Rows of other settings never mix: a file belongs to one card, one PyTorch and one way to measure.
"""

from pathlib import Path
from typing import Any

from mdpd_deploy.files import read_json, write_json

SCHEMA = "mdpd.gpu/1"
Row = dict[str, Any]


class Results:
    """Rows by part, and the file they are in.

    Args:
        path: Read if it is there; written by `add`.
        settings: How rows are measured. A file with other ones is refused.
        machine: What they are measured on, kept as it was when the file was begun.
        retry: Forget rows that have a reason instead of a result.
    """

    def __init__(self, path: Path, settings: Row, machine: Row, *, retry: bool = False) -> None:
        self.path = path
        self.content: Row = {
            "schema": SCHEMA,
            "settings": settings,
            "machine": machine,
            "training": [],
            "latency": [],
        }
        if path.exists():
            self.content = read_results(path)
            _check_settings(path, self.content["settings"], settings)
        if retry:
            for part in ("training", "latency"):
                kept = [row for row in self.content[part] if row["reason"] is None]
                self.content[part] = kept

    def has(self, part: str, key: Row) -> bool:
        """Whether a part holds the row of a key, e.g. {shape, precision, method}."""
        return any(key.items() <= row.items() for row in _plain(self.content[part]))

    def add(self, part: str, row: Row) -> None:
        """Add a row and write the file."""
        self.content[part].append(row)
        write_json(self.path, self.content)


def read_results(path: Path) -> Row:
    """Read a file of `Results`."""
    content = read_json(path, "results")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise SystemExit(f"{path} holds no results of this benchmark: name another --out.")
    return content


def _check_settings(path: Path, found: Row, wanted: Row) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise SystemExit(
                f"{path} was measured with {name} {found.get(name)}, not {value}: name another "
                "--out, or measure as before."
            )


def _plain(rows: list[Row]) -> list[Row]:
    """Return the hashable entries of rows, among which keys are."""
    return [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in rows]
