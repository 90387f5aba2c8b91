"""PyTorch's side of the gates: the model that an export holds its graphs to.

torch is loaded when the model runs, so that `mdpd verify`, which never does, goes without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.bundle import batches
from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.data.examples import Split
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.runtimes.base import Arrays, Forward, Outputs, only
from mdpd_deploy.tasks.metrics import Values

if TYPE_CHECKING:
    import torch

    from mdpd_deploy.model import TaskModel


@dataclass(frozen=True)
class Measured:
    """Examples that the metric is measured on, and what training reported.

    Attributes:
        split: Validation examples.
        metrics: Metric names, the primary one first.
        reported: `summary.metrics.deployed`, or None when other data is measured than in training.
        batch: Examples per run.
    """

    split: Split
    metrics: Sequence[str]
    reported: Values | None
    batch: int


class Reference:
    """PyTorch FP32 on the CPU, which graphs of every precision are compared with.

    Args:
        model: The deployed model.
        preprocess: Raw inputs → arrays, as written into the bundle.
        golden: The golden inputs as written, with the model's outputs.
        measured: Validation examples; None when the metric is not measured.
    """

    def __init__(
        self,
        model: "TaskModel",
        preprocess: Preprocess,
        golden: Golden,
        measured: Measured | None = None,
    ) -> None:
        self.model, self.preprocess = model, preprocess
        self.golden, self.measured = golden, measured
        self._outputs: NDArray[np.float32] | None = None

    def beside(self, forward: Forward) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the one output [n, C] for all examples, of PyTorch (run once) and of a forward."""
        assert self.measured is not None
        own: list[NDArray[np.float32]] = []
        found = []
        self.model.eval()
        for part in batches(self.measured.split.inputs, self.measured.batch):
            arrays = self.preprocess(part)
            if self._outputs is None:
                own.append(only(torch_outputs(self.model, arrays)))
            found.append(only(forward(arrays)))
        if self._outputs is None:
            self._outputs = np.concatenate(own)
        return self._outputs, np.concatenate(found)


def torch_outputs(
    model: "TaskModel", arrays: Mapping[str, NDArray[Any]], names: Sequence[str] | None = None
) -> Outputs:
    """Run the torch model on named arrays, on its own device and in its own mode.

    Args:
        model: The model.
        arrays: Its inputs by name.
        names: What its outputs are called, in order; None = what the model calls them.
    """
    import torch

    device = next(model.parameters()).device
    inputs = [torch.from_numpy(arrays[name]).to(device) for name in model.backbone.input_names]
    with torch.inference_mode():
        found = model(*inputs)
    tensors = (found,) if isinstance(found, torch.Tensor) else found
    pairs = zip(names or model.output_names, tensors, strict=True)
    return {name: np.asarray(tensor.cpu().numpy(), dtype=np.float32) for name, tensor in pairs}


def shape_batches(model: "TaskModel", *, max_batch: int = 8) -> Iterator[tuple[str, Arrays]]:
    """Yield random batches at the shapes a graph must not be fixed to.

    Pictures: batch 1, 5 and `max_batch`. Text: the shortest and the longest sequence with batch 1
    and several, the latter with padded rows.
    """
    backbone = model.backbone
    if backbone.takes == "image":
        for batch in (1, 5, max_batch):
            yield f"batch {batch}", _numpy(backbone.example_inputs(batch))
        return
    longest = getattr(backbone.preprocess, "max_length", 64)
    for batch, tokens in ((1, 3), (1, longest), (5, longest // 2 + 1), (max_batch, 4)):
        arrays = _numpy(backbone.example_inputs(batch, tokens))
        padded = _pad_rows(arrays) if batch > 1 else False
        yield f"batch {batch}, {tokens} tokens{', padded rows' if padded else ''}", arrays


def _pad_rows(arrays: Arrays) -> bool:
    """Mask row i of the batch from token 2 + i on; the last row stays whole."""
    mask = arrays.get("attention_mask")
    if mask is None:
        return False
    for row in range(len(mask) - 1):
        mask[row, 2 + row :] = 0
    return True


def _numpy(inputs: dict[str, "torch.Tensor"]) -> Arrays:
    return {name: np.array(tensor.numpy()) for name, tensor in inputs.items()}
