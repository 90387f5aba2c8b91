"""What a tokenizer's own file may make of a text: a stranger's is a program that may grow.

Looked at before the library reads the file, since its settings are taken at their word: a
replacement of one letter by fifty, four times in a row, makes 6 MB of every letter.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

MOST_BYTES = 100_000_000  # of tokenizer.json; that of a vocabulary of 250,000 has some 17 MB
MOST_GROWTH = 100  # letters that one letter may become; NFKC makes up to 18 of one
LONGEST_WORD = 1000  # letters that WordPiece looks at in each other's company: n³ steps at worst


def check_tokenizer(raw: bytes) -> None:
    """Raise `ValueError` when the settings in a tokenizer's file are out of bounds."""
    if len(raw) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 1_000_000} MB")
    plain = json.loads(raw)
    if not isinstance(plain, dict):
        return  # the library refuses it in words of its own
    growth = 1.0
    for step in _steps(plain.get("normalizer")):
        growth *= _growth(step)
    if growth > MOST_GROWTH:
        raise ValueError(
            f"its normalizer may make more than {MOST_GROWTH} letters of one, which no language needs"
        )
    model = plain.get("model")
    longest = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
    if not isinstance(longest, int) or longest > LONGEST_WORD:
        raise ValueError(f"max_input_chars_per_word is more than {LONGEST_WORD}")


def _steps(normalizer: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, of nested sequences too."""
    todo = [normalizer]
    while todo:
        step = todo.pop()
        if isinstance(step, dict):
            yield step
            inner = step.get("normalizers")
            todo += inner if isinstance(inner, list) else []


def _growth(step: dict[str, Any]) -> float:
    """Return how many letters one letter may become; what starts a text is counted to one too."""
    kind = step.get("type")
    if kind == "Replace":
        pattern = step.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        shortest = len(literal) if isinstance(literal, str) and literal else 1
        between = 0 if literal else 1  # an expression may fit between two letters, which then stay
        return max(1, between + len(str(step.get("content", ""))) / shortest)
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend", "")))
    if kind == "Precompiled":
        return _longest_entry(str(step.get("precompiled_charsmap") or ""))
    return 1  # the forms of Unicode, and what only takes away


def _longest_entry(charsmap: str) -> int:
    """Return the length of the longest text in a table of sentencepiece, which ends each by 0."""
    raw = base64.b64decode(charsmap)
    start = 4 + int.from_bytes(raw[:4], "little")
    entries = raw[start:].split(b"\0")
    return max(1, *(len(entry.decode("utf-8", "replace")) for entry in entries))
