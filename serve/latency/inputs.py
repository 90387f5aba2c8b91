"""What every variant is fed while it is timed: several distinct batches, never zeros."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.preprocess import ImagePreprocess, Preprocess, TextPreprocess

Arrays = dict[str, NDArray[Any]]

SETS = 8  # distinct batches that the rounds rotate through
SHORTEST_TEXT = 4  # tokens of a synthetic text


@dataclass(frozen=True)
class InputSource:
    """Where the inputs of a benchmark come from, and how wide its outputs are.

    Attributes:
        what: One sentence for the report.
        preprocess: Raw inputs → named arrays.
        outputs: C, the width of the models' outputs.
        raws: Real inputs; empty = synthetic ones with the statistics of real ones.
    """

    what: str
    preprocess: Preprocess
    outputs: int
    raws: Sequence[Raw] = ()

    def batches(self, batch: int, *, seed: int, sets: int = SETS) -> list[Arrays]:
        """Return `sets` batches of `batch` examples, preprocessed.

        Real inputs are drawn without repeats as long as there are enough of them.
        """
        rng = np.random.default_rng([seed, batch])
        if not self.raws:
            return [_synthetic(self.preprocess, batch, rng) for _ in range(sets)]
        order = np.concatenate(
            [rng.permutation(len(self.raws)) for _ in range(-(-sets * batch // len(self.raws)))]
        )
        picked = [self.raws[int(i)] for i in order[: sets * batch]]
        return [
            self.preprocess(picked[start : start + batch]) for start in range(0, len(picked), batch)
        ]


def size_of(batches: Sequence[Arrays]) -> str:
    """Write the shape of one example, e.g. `3x32x32`, or `12-37 tokens` where lengths differ."""
    shapes = [tuple(next(iter(arrays.values())).shape[1:]) for arrays in batches]
    if len(shapes[0]) > 1:
        return ", ".join("x".join(map(str, shape)) for shape in sorted(set(shapes)))
    lengths = [length for shape in shapes for length in shape]
    if min(lengths) == max(lengths):
        return f"{lengths[0]} tokens"
    return f"{min(lengths)}-{max(lengths)} tokens"


def _synthetic(preprocess: Preprocess, batch: int, rng: np.random.Generator) -> Arrays:
    if isinstance(preprocess, ImagePreprocess):
        # After normalisation by its data set's mean and deviation a picture is about N(0, 1).
        shape = (batch, 3, *preprocess.size)
        return {preprocess.input_names[0]: rng.standard_normal(shape, dtype=np.float32)}
    return _synthetic_text(preprocess, batch, rng)


def _synthetic_text(preprocess: TextPreprocess, batch: int, rng: np.random.Generator) -> Arrays:
    """Random tokens; lengths spread evenly up to the maximum, padded as the model pads."""
    longest = preprocess.max_length
    lengths = rng.integers(min(SHORTEST_TEXT, longest), longest + 1, size=batch)
    width = longest if preprocess.pad == "max" else int(lengths.max())
    real = np.arange(width)[None, :] < lengths[:, None]
    tokens = rng.integers(preprocess.tokenizer.get_vocab_size(), size=(batch, width))
    arrays = {
        "input_ids": np.where(real, tokens, preprocess.pad_id).astype(np.int64),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": np.zeros((batch, width), dtype=np.int64),
    }
    return {name: arrays[name] for name in preprocess.input_names}
