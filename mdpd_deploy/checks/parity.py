"""Does an exported graph compute what the torch model computes?

Differences are scaled by the spread of the reference outputs: a fixed absolute tolerance makes
harmless misses noise on a head with large logits, and hides real ones on a head with small logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdpd_deploy.checks.policy import POLICIES, spread_of
from mdpd_deploy.model import TaskModel
from mdpd_deploy.runtimes.onnx import Forward

Arrays = dict[str, NDArray[Any]]

FP32_TOLERANCE = POLICIES["fp32"].drift  # of the outputs' standard deviation; 3e-6 is usual


@dataclass(frozen=True)
class Case:
    """One batch that was put through both.

    Attributes:
        name: What is special about it, e.g. `batch 1, 128 tokens`.
        max_abs_diff: Largest absolute difference of an output.
        finite: Whether every output of both was finite.
    """

    name: str
    max_abs_diff: float
    finite: bool


@dataclass(frozen=True)
class Parity:
    """Torch and graph side by side.

    Attributes:
        cases: Every batch.
        spread: Standard deviation of the reference outputs over all cases.
        scaled_diff: Largest difference of any case over the spread.
        tolerance: What `scaled_diff` may be; infinite where it is only reported.
    """

    cases: tuple[Case, ...]
    spread: float
    scaled_diff: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every output is finite and within the tolerance."""
        return self.finite and self.scaled_diff <= self.tolerance

    @property
    def finite(self) -> bool:
        """Whether every output of both was finite and of the same shape."""
        return all(case.finite for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers for `parity.json`; no tolerance is None there."""
        tolerance = None if np.isinf(self.tolerance) else self.tolerance
        return {**asdict(self), "tolerance": tolerance, "passed": self.passed}


def torch_outputs(model: TaskModel, arrays: Arrays) -> NDArray[np.float32]:
    """Run the torch model on named arrays, on its own device and in its own mode; outputs [B, C]."""
    device = next(model.parameters()).device
    inputs = [torch.from_numpy(arrays[name]).to(device) for name in model.backbone.input_names]
    with torch.inference_mode():
        return np.asarray(model(*inputs).cpu().numpy(), dtype=np.float32)


def compare_with_torch(
    model: TaskModel,
    runner: Forward,
    batches: Sequence[tuple[str, Arrays]],
    *,
    tolerance: float = FP32_TOLERANCE,
) -> Parity:
    """Run named batches through torch (FP32, eager mode, CPU) and through the graph.

    Args:
        model: The model that was exported.
        runner: Its graph.
        batches: (name, arrays) of at least one batch; see `shape_batches`.
        tolerance: Largest allowed difference, in standard deviations of the outputs.
    """
    model.eval()
    cases, references = [], []
    for name, arrays in batches:
        reference, outputs = torch_outputs(model, arrays), runner(arrays)
        finite = bool(np.isfinite(reference).all() and np.isfinite(outputs).all())
        same_shape = reference.shape == outputs.shape
        difference = float(np.abs(reference - outputs).max()) if finite and same_shape else np.inf
        cases.append(Case(name, difference, finite and same_shape))
        references.append(reference.ravel())
    values = np.concatenate(references).astype(np.float64)
    spread = spread_of(values)
    worst = max(case.max_abs_diff for case in cases)
    return Parity(tuple(cases), spread, worst / spread, tolerance)


def shape_batches(model: TaskModel, *, max_batch: int = 8) -> Iterator[tuple[str, Arrays]]:
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


def _numpy(inputs: dict[str, torch.Tensor]) -> Arrays:
    return {name: np.array(tensor.numpy()) for name, tensor in inputs.items()}
