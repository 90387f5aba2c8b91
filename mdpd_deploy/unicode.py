"""Texts that can be written: Python's strings may hold halves of surrogate pairs, no file can.

A half is what is left of an emoji cut in two, of `"\\ud83d"` in JSON, or of a file name or an
argument that is not UTF-8.
"""

import re

from mdpd_deploy.errors import UserError

_HALF = re.compile("[\ud800-\udfff]")
_AROUND = 20  # characters shown on both sides


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
