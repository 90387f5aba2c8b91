"""Chooses golden inputs: validation examples, or made-up ones where the data is private."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from mdpd_deploy.artifacts.golden import Golden, keep_raw, spread_evenly
from mdpd_deploy.checks.reference import torch_outputs
from mdpd_deploy.data.examples import Field, Raw
from mdpd_deploy.data.preprocess import ImagePreprocess, Preprocess
from mdpd_deploy.model import TaskModel

COUNT = 8
GoldenSource = Literal["validation", "synthetic"]

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A short one.",
    "It rained all day, yet nobody stayed at home; the streets were full of music until midnight.",
    "Prices rose by 3.5 % in March 2024 (after 2.8 % in February).",
    "Why?",
    "Grüße aus Köln – naïve café, 東京, emoji 🙂.",
    "This film is neither as good as its critics say nor as bad as its makers fear.",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
)


def make_golden(
    model: TaskModel, preprocess: Preprocess, raws: Sequence[Raw], fields: Sequence[Field]
) -> Golden:
    """Run raw inputs through the PyTorch model.

    Args:
        model: The reference, FP32 on the CPU.
        preprocess: What the bundle will carry.
        raws: Validation inputs to choose from; empty = synthetic ones.
        fields: What one input is made of.
    """
    chosen = spread_evenly(raws, COUNT) if raws else synthetic_inputs(preprocess, fields)
    kept = tuple(keep_raw(raw) for raw in chosen)
    arrays = preprocess(kept)
    model.eval()
    return Golden(kept, arrays, torch_outputs(model, arrays))


def synthetic_inputs(preprocess: Preprocess, fields: Sequence[Field]) -> list[Raw]:
    """Return inputs that hold nothing of anyone's data: sentences of ours, or seeded noise."""
    if isinstance(preprocess, ImagePreprocess):
        return [_picture(index, preprocess.size) for index in range(COUNT)]
    if len(fields) > 1:
        return list(zip(_SENTENCES, reversed(_SENTENCES), strict=True))
    return list(_SENTENCES)


def _picture(index: int, size: tuple[int, int]) -> Image.Image:
    """Smooth coloured noise, larger than the model's input and not square."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    height, width = size
    return coarse.resize((width * 5 // 4 + index, height * 6 // 5), Image.Resampling.BICUBIC)
