"""Does an exported graph compute what the torch model computes?

Differences are scaled by the spread of the reference outputs: a fixed absolute tolerance makes
harmless misses noise on a head with large logits, and hides real ones on a head with small logits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdpd_deploy.artifacts.certificate import one_or_all
from mdpd_deploy.checks.policy import POLICIES, spreads_of
from mdpd_deploy.model import TaskModel
from mdpd_deploy.runtimes.base import Arrays, Forward, Outputs

FP32_TOLERANCE = POLICIES["fp32"].drift  # of the outputs' standard deviation; 3e-6 is usual


@dataclass(frozen=True)
class Case:
    """One output of a batch that was put through both.

    Attributes:
        name: What is special about the batch, e.g. `batch 1, 128 tokens`.
        output: The output's name.
        max_abs_diff: Largest absolute difference of a value.
        finite: Whether every value of both was finite, and the shapes equal.
    """

    name: str
    output: str
    max_abs_diff: float
    finite: bool


@dataclass(frozen=True)
class Parity:
    """Torch and graph side by side.

    Attributes:
        cases: Every output of every batch.
        spread: Standard deviation of each reference output over all batches.
        scaled_diff: Largest difference of any case over its output's spread.
        tolerance: What `scaled_diff` may be; infinite where it is only reported.
    """

    cases: tuple[Case, ...]
    spread: Mapping[str, float]
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

    def scaled(self, case: Case) -> float:
        """Return a case's difference in standard deviations of its output."""
        return case.max_abs_diff / self.spread[case.output]

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers for `parity.json`; no tolerance is None there."""
        cases = [asdict(case) for case in self.cases]
        if len(self.spread) == 1:
            cases = [{key: case[key] for key in case if key != "output"} for case in cases]
        return {
            "cases": cases,
            "spread": one_or_all(self.spread),
            "scaled_diff": self.scaled_diff,
            "tolerance": None if np.isinf(self.tolerance) else self.tolerance,
            "passed": self.passed,
        }


def torch_outputs(
    model: TaskModel, arrays: Mapping[str, NDArray[Any]], names: Sequence[str] | None = None
) -> Outputs:
    """Run the torch model on named arrays, on its own device and in its own mode.

    Args:
        model: The model.
        arrays: Its inputs by name.
        names: What its outputs are called, in order; None = what the model calls them.
    """
    device = next(model.parameters()).device
    inputs = [torch.from_numpy(arrays[name]).to(device) for name in model.backbone.input_names]
    with torch.inference_mode():
        found = model(*inputs)
    tensors = (found,) if isinstance(found, torch.Tensor) else found
    pairs = zip(names or model.output_names, tensors, strict=True)
    return {name: np.asarray(tensor.cpu().numpy(), dtype=np.float32) for name, tensor in pairs}


def compare_with_torch(
    model: TaskModel,
    runner: Forward,
    batches: Sequence[tuple[str, Arrays]],
    *,
    tolerance: float = FP32_TOLERANCE,
    names: Sequence[str] | None = None,
) -> Parity:
    """Run named batches through torch (FP32, eager mode, CPU) and through the graph.

    Args:
        model: The model that was exported.
        runner: Its graph.
        batches: (name, arrays) of at least one batch; see `shape_batches`.
        tolerance: Largest allowed difference, in standard deviations of its output.
        names: What the graph calls the model's outputs, in order; None = as the model does.
    """
    model.eval()
    cases, references = [], []
    for batch, arrays in batches:
        reference, outputs = torch_outputs(model, arrays, names), runner(arrays)
        cases += [_case(batch, name, array, outputs) for name, array in reference.items()]
        references.append(reference)
    spread = spreads_of(references)
    worst = max(case.max_abs_diff / spread[case.output] for case in cases)
    return Parity(tuple(cases), spread, worst, tolerance)


def _case(batch: str, name: str, reference: NDArray[np.float32], outputs: Outputs) -> Case:
    found = outputs.get(name)
    if found is None or found.shape != reference.shape:
        return Case(batch, name, np.inf, finite=False)
    finite = bool(np.isfinite(reference).all() and np.isfinite(found).all())
    return Case(batch, name, float(np.abs(reference - found).max()) if finite else np.inf, finite)


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
