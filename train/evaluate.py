"""Outputs and metrics of a model over a split, shared between processes."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from mdpd_deploy.data.examples import Split
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.train.batches import to_tensors

Outputs = dict[str, NDArray[np.float32]]
Forward = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def run_over(
    forward: Forward,
    split: Split,
    preprocess: Preprocess,
    *,
    batch: int,
    state: PartialState,
) -> Outputs:
    """Return every output of `forward` over a split, on every process.

    Args:
        forward: Named inputs on the device → named outputs [B, C].
        split: n examples.
        preprocess: Raw inputs → arrays.
        batch: Examples per forward.
        state: Divides the examples between processes.

    Returns:
        Arrays [n, C] by output name, in the split's order.
    """
    mine = np.array_split(np.arange(len(split)), state.num_processes)[state.process_index]
    parts: list[dict[str, NDArray[np.float32]]] = []
    with torch.no_grad():
        for start in range(0, len(mine), batch):
            raws = [split.inputs[int(i)] for i in mine[start : start + batch]]
            inputs = {k: t.to(state.device) for k, t in to_tensors(preprocess, raws).items()}
            parts.append({k: t.float().cpu().numpy() for k, t in forward(inputs).items()})
    everything = gather_object([parts]) if state.num_processes > 1 else [parts]
    flat = [part for rank in everything for part in rank]
    return {name: np.concatenate([part[name] for part in flat]) for name in flat[0]}
