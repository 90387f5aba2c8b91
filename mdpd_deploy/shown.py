"""How words that may be a stranger's are shown: class names, inputs, what a bundle or a file says.

An escape sequence in them would drive the terminal, and a mark that turns the direction of text
would show another word than the one that is there.
"""

from unicodedata import category

_KEPT = frozenset("\n\u200c\u200d")  # both joiners are part of Persian words and of emoji


def shown(text: str) -> str:
    """Return a text with all that is not visible spelt out, e.g. `\\x1b`; lines stay lines."""
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _KEPT or category(character) == "Zs"
