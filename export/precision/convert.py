"""One precision of a graph: convert, check the file, count what it holds, pass the gates.

Not every precision needs another file: bf16 on a CPU is how OpenVINO runs the FP32 graph.
"""

import logging
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from mdpd_deploy.artifacts.manifest import EXTERNAL_FILE
from mdpd_deploy.checks import golden, metric, parity
from mdpd_deploy.checks.policy import POLICIES, ParityMode
from mdpd_deploy.checks.reference import Reference
from mdpd_deploy.checks.subject import Seen
from mdpd_deploy.errors import ExportError
from mdpd_deploy.export.precision.bf16_twin import write_twin
from mdpd_deploy.export.precision.checks import check_converted
from mdpd_deploy.export.precision.forms import Form
from mdpd_deploy.export.precision.material import Material
from mdpd_deploy.export.precision.onnxruntime_cpu import quiet
from mdpd_deploy.export.precision.weight_report import WeightReport, require_met, weight_report
from mdpd_deploy.graphs.trace import strip_notes
from mdpd_deploy.runtimes.base import Runtime
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.runtimes.openvino import OpenVinoRunner

logger = logging.getLogger(__name__)

TWIN = (
    "measured on a float32 twin that rounds every bfloat16 value, since ONNX Runtime has no "
    "bfloat16 kernels on the CPU"
)


@dataclass(frozen=True)
class Candidate:
    """A graph in one precision that passed its gates.

    Attributes:
        form: What was asked for.
        graph: The `.onnx` file.
        how: Who converted it, in a phrase.
        report: What it holds.
        gates: parity, metric and golden; empty for fp32 in ONNX Runtime, whose own gates stand.
        engine: The TensorRT engine that was built of the graph, where that is what runs.
    """

    form: Form
    graph: Path
    how: str
    report: WeightReport
    gates: dict[str, Seen] = field(default_factory=dict)
    engine: Path | None = None

    @property
    def warned(self) -> bool:
        """Whether a gate was missed, which `--parity warn` allows."""
        return any(seen.verdict == "warned" for seen in self.gates.values())


def unconverted(form: Form, graph: Path) -> Candidate:
    """Return the FP32 graph as a candidate."""
    report = weight_report(graph, form.weights)
    require_met(report, form.precision)
    return Candidate(form, graph, "as traced", report)


def run_by_openvino(
    form: Form, graph: Path, *, reference: Reference, mode: ParityMode
) -> Candidate:
    """Hold the FP32 graph, as OpenVINO runs it in the form's precision, to its gates.

    Raises:
        UserError: If OpenVINO is not installed, or computes in another precision on this processor.
        VerificationError: If a gate fails.
    """
    logger.info("verifying %s", form.name)
    runner = OpenVinoRunner(graph, precision=form.precision)
    gates = _pass_gates(form, runner, reference, mode)
    made = unconverted(form, graph)
    report = replace(made.report, compute_nodes=dict(runner.products))
    how = f"as traced, computed in {form.precision} by OpenVINO"
    return replace(made, how=how, report=report, gates=gates)


def convert(
    form: Form,
    source: Path,
    target: Path,
    *,
    material: Material,
    reference: Reference,
    mode: ParityMode,
) -> Candidate:
    """Convert the FP32 graph and hold the result to its gates.

    Args:
        form: What to make; not fp32.
        source: The FP32 graph.
        target: The file to write.
        material: What the converter may look at.
        reference: PyTorch FP32.
        mode: Whether a gate that is missed fails or warns.

    Raises:
        UserError: If something that the conversion needs is missing.
        ExportError: If the conversion fails or its result is not what was asked for.
        VerificationError: If a gate fails.
    """
    assert form.convert is not None
    if source.with_name(EXTERNAL_FILE).exists():
        raise ExportError(
            f"--precision {form.precision}: graphs whose weights need a file of their own (over "
            "1.5 GB) are exported in fp32 only."
        )
    logger.info("converting to %s", form.precision)
    with quiet():
        how = form.convert(source, target, material)
    check_converted(source, target, form.precision)
    proto = onnx.load(target)
    strip_notes(proto)
    target.write_bytes(proto.SerializeToString(deterministic=True))
    report = weight_report(target, form.weights)
    require_met(report, form.precision)
    logger.info("verifying %s", form.precision)
    gates = _pass_gates(form, _open(form, target), reference, mode)
    return Candidate(form, target, how, report, gates)


def _open(form: Form, graph: Path) -> Runtime:
    """Open a converted graph, or its twin where no CPU has kernels for it."""
    if form.runtime == "openvino":
        return OpenVinoRunner(graph, precision=form.precision)
    if form.weights != "bfloat16":
        return OnnxRunner(graph)
    with tempfile.TemporaryDirectory(prefix="mdpd-twin-") as scratch:
        return OnnxRunner(write_twin(graph, Path(scratch, "twin.onnx")))


def _pass_gates(
    form: Form, runner: Runtime, reference: Reference, mode: ParityMode
) -> dict[str, Seen]:
    policy = POLICIES[form.precision]
    seen, compared = parity.prove_converted(reference, runner, policy, mode)
    gates = {
        "parity": seen,
        "metric": metric.prove_converted(reference, runner, policy, compared, mode),
        "golden": golden.prove(reference, runner, compared),
    }
    if form.weights == "bfloat16":
        return {name: replace(seen, note=f"{seen.note}; {TWIN}") for name, seen in gates.items()}
    return gates
