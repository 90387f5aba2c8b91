"""What lies where the data were read, and what becomes of it: used, or left out for a reason."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdpd_deploy.errors import UserError, printable

NAMED = 3  # examples kept of everything left out for one reason
SAID = 6  # reasons in the one line; the summary has all
SYSTEM = frozenset(
    {
        "__macosx",
        "__pycache__",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)


@dataclass(frozen=True)
class LeftOut:
    """Files, folders, rows or pictures that are not used, for one reason.

    Attributes:
        reason: Reads on after a number, e.g. `hidden or of the system`.
        count: How many.
        examples: The names of the first few.
    """

    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """The account of everything that was found.

    Attributes:
        used: Split → examples that are trained on or measured.
        left_out: What is not, by reason.
    """

    used: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()

    def __add__(self, other: "Inventory") -> "Inventory":
        """Return both accounts in one; `used` is the other's where it has any."""
        merged: dict[str, LeftOut] = {}
        for entry in (*self.left_out, *other.left_out):
            known = merged.get(entry.reason, LeftOut(entry.reason, 0, ()))
            examples = tuple(dict.fromkeys((*known.examples, *entry.examples)))[:NAMED]
            merged[entry.reason] = LeftOut(entry.reason, known.count + entry.count, examples)
        return Inventory(other.used or self.used, tuple(merged.values()))

    @property
    def line(self) -> str | None:
        """The sentence on what is left out; None when nothing is."""
        if not self.left_out:
            return None
        ordered = sorted(self.left_out, key=lambda entry: -entry.count)
        parts = [f"{e.count:,} {e.reason}{_named(e)}" for e in ordered[:SAID]]
        if len(ordered) > SAID:
            rest = sum(entry.count for entry in ordered[SAID:])
            parts.append(f"{rest:,} for {len(ordered) - SAID} more reasons (see summary.json)")
        return f"found and left out: {'; '.join(parts)}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `summary.json` keeps them."""
        left = [{**asdict(entry), "examples": list(entry.examples)} for entry in self.left_out]
        return {"used": dict(self.used), "left_out": left}


NOTHING = Inventory()


def left_out(found: Iterable[tuple[str, str]]) -> Inventory:
    """Return the account of (reason, name) pairs."""
    names: dict[str, list[str]] = defaultdict(list)
    for reason, name in found:
        names[reason].append(name)
    parts = [many_left_out(reason, len(those), *those) for reason, those in names.items()]
    return sum(parts, NOTHING)


def many_left_out(reason: str, count: int, *examples: str) -> Inventory:
    """Return the account of `count` things of one reason; of none, the empty account."""
    named = tuple(printable(name) for name in examples[:NAMED])
    return Inventory(left_out=(LeftOut(reason, count, named),) if count else ())


def is_system(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that systems strew about."""
    return name.startswith(".") or name.lower() in SYSTEM


HIDDEN = "hidden or of the system"
BROKEN_LINK = "links that lead nowhere"
NO_FILE = "neither files nor folders"
FOLDER_LINK = "links to folders"


def why_unread(path: Path) -> str | None:
    """Return why no reader looks at a file or folder, whatever it holds; None if it may be read."""
    if is_system(path.name):
        return HIDDEN
    if path.is_symlink() and not path.exists():
        return BROKEN_LINK
    return None if path.is_file() or path.is_dir() else NO_FILE


def walk(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield every file below a folder with the reason why it cannot be read, or None, sorted.

    Hidden folders, those of the system and links to folders count as one and are not entered.

    Raises:
        UserError: If a folder cannot be listed.
    """
    for folder, folders, files in os.walk(root, onerror=_refuse):
        here = Path(folder)
        entered = []
        for name in sorted(folders):
            path = here / name
            reason = HIDDEN if is_system(name) else FOLDER_LINK if path.is_symlink() else None
            if reason is None:
                entered.append(name)
            else:
                yield path, reason
        folders[:] = entered
        for name in sorted(files):
            yield here / name, why_unread(here / name)


def _refuse(err: OSError) -> None:
    raise UserError(
        f"the folder {err.filename} cannot be read ({err.strerror or err}): correct its permissions."
    ) from err


def _named(entry: LeftOut) -> str:
    if not entry.examples:
        return ""
    more = ", …" if entry.count > len(entry.examples) else ""
    return f" ({', '.join(entry.examples)}{more})"
