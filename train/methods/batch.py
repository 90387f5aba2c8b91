"""What a method is given, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A part of one optimiser step.

    Attributes:
        inputs: Named tensors.
        labels: [B], as `Task.wanted` gives them; of mixed pictures the shares of classes [B, C].
        keys: Position of each example in the training data [B].
        step: The optimiser step.
        count: Examples in the whole optimiser step, over all parts and processes.
        weight: Sum of their class weights (= count without class weights).
        progress: Share of the run's steps that lie behind it.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    keys: NDArray[np.int64]
    step: int
    count: float
    weight: float
    progress: float = 1.0
