"""Words of strangers: class names, inputs, what a bundle or a file says of itself.

Python's strings may hold halves of surrogate pairs, no file can: a half is what is left of an emoji
cut in two, of `"\\ud83d"` in JSON, or of a file name or an argument that is not UTF-8. An escape
sequence would drive the terminal that shows it, and a mark that turns the direction of text would
show another word than the one that is there.
"""

import re
from collections.abc import Sequence
from unicodedata import category

from mdpd_deploy.errors import UserError

_HALF = re.compile("[\ud800-\udfff]")
_AROUND = 20  # characters shown on both sides
_KEPT = frozenset("\n\u200c\u200d")  # both joiners are part of Persian words and of emoji


def shown(text: str) -> str:
    """Return a text with all that is not visible spelt out, e.g. `\\x1b`; lines stay lines."""
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _KEPT or category(character) == "Zs"


def is_unicode(text: str) -> bool:
    """Return whether a text holds no half of a surrogate pair."""
    return text.isascii() or _HALF.search(text) is None


def require_unicode(text: str, what: str) -> None:
    """Raise `UserError` for a text with a half of a surrogate pair.

    Args:
        text: Any text.
        what: Names it and its place, e.g. `reviews.jsonl line 7: the text`.
    """
    half = None if text.isascii() else _HALF.search(text)
    if half is not None:
        at = half.start()
        shown = ascii(text[max(0, at - _AROUND) : at + _AROUND])
        raise UserError(
            f"{what} {shown} is no valid Unicode: its character {at + 1} is half of a pair, as a cut "
            "emoji or another encoding than UTF-8 leaves it: remove it."
        )


def is_encoding(name: str) -> bool:
    """Tell whether Python knows an encoding of texts by this name."""
    try:
        b"x".decode(name)
    except UnicodeError:  # too short for it, as one byte is for UTF-16
        return True
    except (LookupError, ValueError):
        return False
    return True


def listed(names: Sequence[str], most: int = 10) -> str:
    """Write a list of names for a message, shortened after `most` of them."""
    first = ", ".join(names[:most])
    return f"{first}, … ({len(names)} in all)" if len(names) > most else first
