"""The gates: a bundle exists only if its graph passed every one of them.

side_free  no tensor of a side network is in the graph
identity   node for node the graph of the bare backbone with the same head
parity     the numbers of PyTorch FP32, at several batch sizes and lengths
metric     the task metric of PyTorch, which is the one that training reported
golden     raw inputs through the bundle's own preprocessing give the right outputs
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from mdpd_deploy.artifacts.bundle import batches
from mdpd_deploy.artifacts.golden import Golden, load_golden, replay
from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.checks.parity import (
    Parity,
    compare_with_torch,
    shape_batches,
    torch_outputs,
)
from mdpd_deploy.checks.policy import ParityMode, label_spread
from mdpd_deploy.data.examples import Split, split_sha256
from mdpd_deploy.data.preprocess import Preprocess, load_preprocess
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.export.fade import Faded, bare_norms, make_comparable
from mdpd_deploy.graphs.signature import Signature, graph_signature, value_digest, values_sha256
from mdpd_deploy.graphs.trace import OnnxGraph, changed_weights, export_onnx, same_structure
from mdpd_deploy.model import TaskModel
from mdpd_deploy.runtimes.base import Arrays, Forward, only
from mdpd_deploy.sides.base import SideNetwork
from mdpd_deploy.tasks.metrics import LOWER_IS_BETTER, Values, agree, compute, metric_text

METRIC_TOLERANCE = 1e-3  # 0.1 point
GOLDEN_CASE = "golden inputs"
DEPLOYS_MORE = "this method deploys more than the backbone and a head"
Verdict = Literal["passed", "skipped", "not applicable", "warned"]


@dataclass(frozen=True)
class Gate:
    """One verdict.

    Attributes:
        name: As the table above.
        verdict: A gate that fails raises instead, or warns where the user asked for that.
        note: One sentence.
        details: Numbers for `parity.json`.
    """

    name: str
    verdict: Verdict
    note: str
    details: dict[str, Any] = field(default_factory=dict)


def check_side_free(faded: Faded, graph: OnnxGraph) -> Gate:
    """No side network in the module, by name in the graph, or by count of numbers in the graph."""
    if not faded.faded:
        return Gate("side_free", "not applicable", DEPLOYS_MORE)
    inside = [n for n, module in faded.model.named_modules() if isinstance(module, SideNetwork)]
    weights = onnx.load(graph.path, load_external_data=False).graph.initializer
    named = [tensor.name for tensor in weights if tensor.name.startswith("side")]
    if inside or named:
        raise VerificationError(f"side_free: {(inside + named)[0]} belongs to the side network.")
    floats = [tensor for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT]
    numbers = sum(int(np.prod(tensor.dims)) for tensor in floats)
    own = (*faded.model.parameters(), *faded.model.buffers())  # masks of windows too
    expected = sum(tensor.numel() for tensor in own)
    if numbers > expected + graph.nodes:  # the exporter adds a scalar constant here and there
        raise VerificationError(
            f"side_free: the graph holds {numbers} numbers, backbone and head only {expected}."
        )
    details = {"graph_numbers": numbers, "model_numbers": expected}
    return Gate("side_free", "passed", "no side-network tensor in the graph", details)


def check_identity(faded: Faded, graph: OnnxGraph) -> Gate:
    """Node for node the bare backbone's graph; only values of changed tensors differ."""
    if faded.bare is None:
        return Gate("identity", "not applicable", DEPLOYS_MORE)
    norms = bare_norms(faded)
    kept = None if norms is None else {n: value_digest(t.numpy()) for n, t in norms.items()}
    make_comparable(faded)
    with tempfile.TemporaryDirectory(prefix="mdpd-bare-") as folder:
        bare = export_onnx(faded.bare, Path(folder, "bare.onnx"))
        differences = same_structure(graph.path, bare.path)
        if differences:
            raise VerificationError(f"identity: the graph is not the backbone's: {differences[0]}.")
        values = changed_weights(graph.path, bare.path)
        bare_signature = graph_signature(bare.path)
    shapes = {name: tensor.dim() for name, tensor in faded.model.state_dict().items()}
    vectors_only = all(shapes[name] <= 1 for name in faded.changed)
    strays = sorted(set(values) - set(faded.changed)) if vectors_only else []
    if strays:  # matrices are renamed by the exporter, so only vectors can be held to their names
        raise VerificationError(
            f"identity: {strays[0]} differs from the backbone's untuned weight."
        )
    note = f"{graph.nodes} nodes equal the bare backbone's; {len(values)} weights differ in value"
    details = {
        "nodes": graph.nodes,
        "changed_weights": values,
        "structure_sha256": bare_signature.structure_sha256,
        "bare_values_sha256": None
        if kept is None
        else _bare_values(graph.path, bare_signature, kept),
    }
    return Gate("identity", "passed", note, details)


def _bare_values(path: Path, bare: Signature, kept: Mapping[str, str]) -> str:
    """Hash the bare graph's weights; norms that were varied for the trace count by what is kept."""
    pairs = zip(graph_signature(path).weights, bare.weights, strict=True)
    return values_sha256(kept.get(own.name, weight.digest) for own, weight in pairs)


def check_parity(
    model: TaskModel,
    runner: Forward,
    golden: Golden,
    *,
    mode: ParityMode = "fail",
    names: Sequence[str] | None = None,
) -> tuple[Gate, Parity]:
    """PyTorch's numbers at every shape that matters, and on the golden inputs."""
    parity = compare_with_torch(model, runner, parity_batches(model, golden), names=names)
    if not parity.passed:
        worst = max(parity.cases, key=lambda case: (not case.finite, parity.scaled(case)))
        told = (
            f"outputs differ from PyTorch by {parity.scaled_diff:.1e} of their spread at "
            f"{worst.name}, allowed {parity.tolerance:.0e}"
        )
        if mode == "fail" or not parity.finite:
            raise VerificationError(f"parity: {told}.")
        return Gate("parity", "warned", f"{told} (--parity warn)", parity.to_json()), parity
    note = f"largest difference {parity.scaled_diff:.1e} of the outputs' spread"
    return Gate("parity", "passed", note, parity.to_json()), parity


def parity_batches(model: TaskModel, golden: Golden) -> list[tuple[str, Arrays]]:
    """Return what parity is measured on; the golden inputs come last."""
    return [*shape_batches(model), (GOLDEN_CASE, golden.arrays)]


@dataclass(frozen=True)
class Measured:
    """What the metric gate compares.

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


def check_metric(
    model: TaskModel,
    runner: Forward,
    preprocess: Preprocess,
    measured: Measured,
    parity: Parity,
) -> Gate:
    """The task metric by ONNX Runtime is PyTorch's, and PyTorch's is the one training reported."""
    reference, outputs = _both_outputs(model, runner, preprocess, measured)
    labels, names = measured.split.labels, measured.metrics
    by_torch, by_onnx = compute(names, reference, labels), compute(names, outputs, labels)
    flipped = flipped_predictions(
        reference, outputs, parity.tolerance * max(parity.spread.values())
    )
    if flipped:
        raise VerificationError(
            f"metric: {flipped} of {len(labels)} predictions differ from PyTorch's beyond rounding."
        )
    _compare("ONNX Runtime", by_onnx, "PyTorch", by_torch, labels)
    if measured.reported is not None:
        _compare("PyTorch", by_torch, "the run's summary", measured.reported, labels)
    primary = names[0]
    where = split_name("validation", len(labels))
    note = (
        f"{primary} {metric_text(by_onnx[primary])} on {where}, "
        f"PyTorch {metric_text(by_torch[primary])}"
    )
    details = {
        "examples": len(labels),
        "examples_sha256": split_sha256(measured.split),
        "allowed": {name: allowed_drop(name, labels) for name in names},
        "onnx": by_onnx,
        "torch": by_torch,
        "reported": measured.reported,
        "max_abs_diff": float(np.abs(reference - outputs).max()),
    }
    return Gate("metric", "passed", note, details)


def check_golden(folder: Path, golden_file: Path, runner: Forward, parity: Parity) -> Gate:
    """Replay the written golden file through the written preprocessing.

    Where parity sets no tolerance, or was missed with a warning, the replay must still give what
    parity saw on these inputs.
    """
    seen = max((parity.scaled(c) for c in parity.cases if c.name == GOLDEN_CASE), default=0.0)
    allowed = parity.tolerance
    if not parity.passed or np.isinf(allowed):
        allowed = 1.01 * seen + 1e-6
    golden = load_golden(golden_file, names=tuple(parity.spread))
    return replayed(golden, load_preprocess(folder), runner, parity.spread, allowed)


def replayed(
    golden: Golden,
    preprocess: Preprocess,
    runner: Forward,
    spread: Mapping[str, float],
    allowed: float,
) -> Gate:
    """Replay golden inputs through a bundle's own preprocessing; arrays must be equal.

    Args:
        golden: Inputs and outputs.
        preprocess: As written into the bundle.
        runner: The graph.
        spread: Standard deviation of each output.
        allowed: How far outputs may be off, in that unit.
    """
    result = replay(golden, preprocess, runner, spread)
    same, close = result.preprocessing_diff == 0, result.output_diff <= allowed
    if not (same and close):  # neither holds for NaN
        raise VerificationError(
            f"golden: a replay from raw input is off by {result.preprocessing_diff:.1e} after "
            f"preprocessing and by {result.output_diff:.1e} of the spread at the output."
        )
    note = "raw inputs replayed through the bundle's preprocessing"
    return Gate("golden", "passed", note, {"output_diff": result.output_diff})


def flipped_predictions(
    reference: NDArray[np.float32], outputs: NDArray[np.float32], drift: float
) -> int:
    """Count rows whose predicted class differs although the reference's margin exceeds the drift.

    For scores [n, 1]: rows that differ by more than the drift.
    """
    if reference.shape[1] == 1:
        return int((np.abs(reference - outputs) > drift).sum())
    ordered = np.sort(reference, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    differs = reference.argmax(axis=1) != outputs.argmax(axis=1)
    return int((differs & (margin > 2 * drift)).sum())  # each of two logits may drift


def _both_outputs(
    model: TaskModel, runner: Forward, preprocess: Preprocess, measured: Measured
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    model.eval()
    pairs = []
    for raws in batches(measured.split.inputs, measured.batch):
        arrays = preprocess(raws)
        pairs.append((only(torch_outputs(model, arrays)), only(runner(arrays))))
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def allowed_drop(name: str, labels: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """Return how far a metric may be off: 0.1 point or one example, the larger."""
    scale = label_spread(labels) if name in LOWER_IS_BETTER else 1.0
    return max(METRIC_TOLERANCE, 1 / len(labels)) * scale


def _compare(
    what: str,
    found: Values,
    other: str,
    expected: Values,
    labels: NDArray[np.int64] | NDArray[np.float64],
) -> None:
    """Raise when a metric differs by more than `allowed_drop`."""
    for name in found.keys() & expected.keys():
        if not agree(found[name], expected[name], allowed_drop(name, labels)):
            raise VerificationError(
                f"metric: {name} is {metric_text(found[name])} by {what} and "
                f"{metric_text(expected[name])} by {other}, {len(labels)} examples."
            )
