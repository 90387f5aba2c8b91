"""A run's scores by split, in the order in which they count: the test split comes first.

Validation usually chose the weights that were kept, so its score is optimistic; a labelled test
split chose nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SplitScores:
    """What was measured on one split.

    Attributes:
        split: Its name.
        examples: How many it holds; None in a summary that does not say.
        models: `deployed`, and `side` for an MDPD run → metric → value.
        majority: What always answering the most frequent class scores; None for a regression.
        chose: Whether it chose the kept weights among those of several evaluations.
    """

    split: str
    examples: int | None
    models: Mapping[str, Mapping[str, float | None]]
    majority: Mapping[str, float | None] | None
    chose: bool

    @property
    def words(self) -> str:
        """Name and size, e.g. `test, 2,000 examples`."""
        return split_name(self.split, self.examples)


def split_name(split: str, examples: int | None) -> str:
    """Say which split, and how many examples it holds."""
    if examples is None:
        return split
    return f"{split}, {examples:,} example{'s' * (examples != 1)}"


def in_order(splits: Iterable[str]) -> list[str]:
    """Return names of splits with test first, then validation, the rest as they came."""
    return sorted(splits, key=lambda name: (name != "test", name != "validation"))


def key_of(what: str, split: str) -> str:
    """Return where summary.json keeps `metrics` or `majority` of a split."""
    return what if split == "validation" else f"{what}_{split}"


def scores_of(summary: Mapping[str, Any]) -> list[SplitScores]:
    """Return every score of a summary.json, those that count most first; the first is the headline."""
    sizes = summary.get("data") or {}
    others = (key.removeprefix("metrics_") for key in summary if key.startswith("metrics_"))
    return [
        SplitScores(
            split=split,
            examples=sizes.get(split),
            models=summary[key_of("metrics", split)],
            majority=summary.get(key_of("majority", split)),
            chose=summary.get("weights_chosen_on") == split,
        )
        for split in in_order(("validation", *others))
    ]
