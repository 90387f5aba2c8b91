"""Texts longer than a model reads: what of them is tokenised, and which tokens are kept.

The tokenizers library keeps what it truncates as "overflowing" parts, for pairs every part of one
text beside every part of the other: two texts of 40 kB take all memory. So it tokenises without
truncation here, and the tokens are chosen as its `longest_first` does.

Of a far too long text only a beginning is tokenised (an ending where texts are cut at the left),
where that provably gives the same tokens: a cut changes the words next to it and none farther away,
so the tokens that are kept must belong to those. A piece that has too few of them (a long run of
blanks, a word without end) is doubled until it has enough or is the whole text.
"""

from typing import Literal

from tokenizers import Encoding, Tokenizer

from mdpd_deploy.data.examples import Text

Side = Literal["right", "left"]  # where a text loses its tokens

CHARACTERS_PER_TOKEN = 8  # more than in most texts, so that the first beginning is enough
SHORTEST = 2048  # characters; what is shorter is not cut
WORDS_APART = (
    3  # between the tokens kept and the cut, which a look ahead or an accent may reach over
)


def cut_text(tokenizer: Tokenizer, text: Text, most: int, side: Side = "right") -> Text:
    """Return a text, or a pair, of which the same `most` tokens are kept.

    Args:
        tokenizer: Does not truncate.
        text: The text.
        most: Tokens kept, special ones included.
        side: Where texts are cut.
    """
    if isinstance(text, str):
        return _piece(tokenizer, text, most, side)
    short, long = sorted(text, key=len)
    if len(long) <= _first_length(most):
        return text
    # Which of the two has more tokens decides what is kept, so the shorter one is read to its end.
    count = len(tokenizer.encode(short, add_special_tokens=False))
    cut = _piece(tokenizer, long, max(most, count + 1), side)
    return (cut, short) if text[0] is long else (short, cut)


def keep_tokens(encoding: Encoding, most: int, side: Side = "right") -> list[int] | None:
    """Return which tokens are kept, of a pair the longer text giving first; None = all of them.

    Args:
        encoding: Of a text or a pair, not truncated.
        most: Tokens kept, special ones included.
        side: Where texts are cut.
    """
    if len(encoding) <= most:
        return None
    owners = encoding.sequence_ids  # 0 or 1; None for a special token
    counts = owners.count(0), owners.count(1)
    left = list(_shares(*counts, most - len(owners) + sum(counts)))
    kept: list[int] = []
    places = list(enumerate(owners))
    for position, owner in places if side == "right" else reversed(places):
        if owner is not None:
            left[owner] -= 1
        if owner is None or left[owner] >= 0:
            kept.append(position)
    return sorted(kept)


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each text are kept: the shorter one loses none it need not."""
    room = max(room, 0)
    short, long = sorted((first, second))
    long = min(long, max(short, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    if not second:
        return min(first, room), 0
    return (long, short) if first > second else (short, long)


def _piece(tokenizer: Tokenizer, text: str, needed: int, side: Side) -> str:
    """Return a piece of a text with `needed` tokens that are also the text's, or all of it."""
    length = _first_length(needed)
    while length < len(text):
        piece = text[:length] if side == "right" else text[-length:]
        if _is_settled(tokenizer.encode(piece, add_special_tokens=False), needed, side):
            return piece
        length *= 2
    return text


def _first_length(tokens: int) -> int:
    return max(SHORTEST, CHARACTERS_PER_TOKEN * tokens)


def _is_settled(encoding: Encoding, needed: int, side: Side) -> bool:
    words = encoding.word_ids
    if len(words) < needed:
        return False
    if side == "right":
        kept, cut = words[needed - 1], words[-1]
    else:
        kept, cut = words[-needed], words[0]
    return kept is not None and cut is not None and abs(kept - cut) >= WORDS_APART
