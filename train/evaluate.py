"""Outputs of a model over a split, shared between processes."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from mdpd_deploy.train.batches import to_tensors
from mdpd_deploy.train.setup import Setup

Outputs = dict[str, NDArray[np.float32]]
Forward = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def run_over(setup: Setup, split: str, forward: Forward) -> Outputs:
    """Return every output over a split [n, C] by name, in its order, on every process.

    Args:
        setup: The run.
        split: Of its evaluation data.
        forward: Named inputs on the device → named outputs [B, C].
    """
    state, batch = setup.state, setup.config.train.eval_batch
    examples = setup.data.evaluation[split].inputs
    mine = np.array_split(np.arange(len(examples)), state.num_processes)[state.process_index]
    parts: list[dict[str, NDArray[np.float32]]] = []
    with torch.no_grad():
        for start in range(0, len(mine), batch):
            raws = [examples[int(i)] for i in mine[start : start + batch]]
            inputs = to_tensors(setup.backbone.preprocess, raws)
            out = forward({name: tensor.to(state.device) for name, tensor in inputs.items()})
            parts.append({name: tensor.float().cpu().numpy() for name, tensor in out.items()})
    everything = gather_object([parts]) if state.num_processes > 1 else [parts]
    flat = [part for rank in everything for part in rank]
    return {name: np.concatenate([part[name] for part in flat]) for name in flat[0]}
