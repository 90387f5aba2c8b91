"""The memory forecast of many methods side by side, at one backbone, batch and precision."""

from collections.abc import Sequence
from dataclasses import dataclass

from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.train.entries import Entry, apply_entry, parse_entry
from mdpd_deploy.train.forecast import MemoryForecast, forecast


@dataclass(frozen=True)
class MemoryRow:
    """One method of the table.

    Attributes:
        method: Its word, e.g. `mdpd:unipt`.
        forecast: What a step needs; None where the method does not fit.
        reason: Why it does not fit, else None.
    """

    method: str
    forecast: MemoryForecast | None
    reason: str | None = None


def memory_table(
    config: Config, methods: Sequence[str], *, outputs: int, kind: str
) -> tuple[MemoryRow, ...]:
    """Forecast methods in the order given; one that does not fit has its reason in its row.

    Args:
        config: Backbone, batch, text length, precision and whatever options the methods read;
            its own method does not matter.
        methods: Words of `entries.parse_entry`; `default_entries` has all of them.
        outputs: C, classes or 1.
        kind: classify or regress.

    Raises:
        UserError: For an unknown word.
    """
    entries = [parse_entry(word) for word in methods]
    return tuple(_row(config, entry, outputs, kind) for entry in entries)


def _row(config: Config, entry: Entry, outputs: int, kind: str) -> MemoryRow:
    try:
        found = forecast(apply_entry(config, entry), outputs=outputs, kind=kind)
    except UserError as err:
        return MemoryRow(entry.label, None, str(err))
    return MemoryRow(entry.label, found)
