"""How long texts are in tokens, and how many are cut: what `data.max_length` is chosen by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mdpd_deploy.data.examples import Raw, Split, parts_of
from mdpd_deploy.data.preprocess import TextPreprocess

MOST_TEXTS, MOST_CHARACTERS = 2_000, 500_000  # counted of a split: a second of tokenising
MOST_OF_A_TEXT = 50_000  # characters; what is longer is cut at any max_length
LONGEST = 8  # texts by characters that are counted too where the sample has none that is cut


@dataclass(frozen=True)
class TextLengths:
    """Tokens of a split's texts (or pairs) before they are cut, special ones included.

    Attributes:
        examples: Texts of the split.
        counted: Of those, how many were counted: all of a small split, a random sample of a large.
        p95: 95 % of the counted have at most so many tokens.
        longest: Tokens of the longest one that was found.
        cut: How many of the counted are longer than `max_length`.
        max_length: `data.max_length`.
    """

    examples: int
    counted: int
    p95: int
    longest: int
    cut: int
    max_length: int

    def __str__(self) -> str:
        """Say it in a part of a sentence."""
        cut = "none are cut"
        if self.cut:
            share = self.cut / self.counted
            cut = f"{self.cut:,} ({share:.1%}) are cut to data.max_length={self.max_length}"
        of = f"a sample of {self.counted:,} of " if self.counted < self.examples else ""
        return (
            f"of {of}{self.examples:,} texts, 95 % have at most {self.p95:,} tokens, the longest "
            f"{self.longest:,}; {cut}"
        )


def text_lengths(split: Split, preprocess: TextPreprocess) -> TextLengths:
    """Count the tokens of a split's texts, or of a random sample where they are many."""
    characters = np.array([sum(map(len, parts_of(raw))) for raw in split.inputs], dtype=np.int64)
    chosen = _sample(characters)
    tokens = preprocess.count_tokens([_short(split.inputs[i]) for i in chosen])
    longest = int(tokens.max())
    if len(chosen) < len(split) and longest <= preprocess.max_length:
        most = np.argsort(-characters, kind="stable")[:LONGEST]
        longest = max(
            longest, *preprocess.count_tokens([_short(split.inputs[i]) for i in most]).tolist()
        )
    return TextLengths(
        examples=len(split),
        counted=len(chosen),
        p95=int(np.percentile(tokens, 95, method="inverted_cdf")),
        longest=longest,
        cut=int((tokens > preprocess.max_length).sum()),
        max_length=preprocess.max_length,
    )


def lengths_note(lengths: Mapping[str, TextLengths]) -> str:
    """Return one sentence on every split."""
    return f"{'; '.join(f'{name}: {found}' for name, found in lengths.items())}."


def _sample(characters: np.ndarray) -> Sequence[int]:
    """Return the positions to count: a random choice of at most so many texts and characters."""
    order = np.random.RandomState(0).permutation(len(characters))[:MOST_TEXTS]
    total = np.minimum(characters, MOST_OF_A_TEXT)[order].cumsum()
    fitting = max(1, int(np.searchsorted(total, MOST_CHARACTERS, side="right")))
    return [int(i) for i in order[:fitting]]


def _short(raw: Raw) -> Raw:
    if isinstance(raw, str):
        return raw[:MOST_OF_A_TEXT]
    first, second = parts_of(raw)
    return first[:MOST_OF_A_TEXT], second[:MOST_OF_A_TEXT]
