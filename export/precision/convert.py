"""One precision of a graph: convert, check the file, take the receipt, pass the gates."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from mdpd_deploy.artifacts.golden import Golden, spread_evenly
from mdpd_deploy.artifacts.manifest import EXTERNAL_FILE, GOLDEN_FILE, PREPROCESSOR
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.checks.policy import POLICIES, ParityMode
from mdpd_deploy.errors import ExportError, UserError
from mdpd_deploy.export.gates import Gate, check_golden
from mdpd_deploy.export.golden import GoldenSource
from mdpd_deploy.export.precision.bf16_twin import write_twin
from mdpd_deploy.export.precision.checks import check_converted
from mdpd_deploy.export.precision.forms import Form
from mdpd_deploy.export.precision.gates import Reference, check_reduced_metric, check_reduced_parity
from mdpd_deploy.export.precision.material import Calibration, Material
from mdpd_deploy.export.precision.runtime_tools import quiet
from mdpd_deploy.export.precision.weight_report import Receipt, require_met, take_receipt
from mdpd_deploy.graphs.trace import strip_notes
from mdpd_deploy.runtimes.onnx import OnnxRunner

logger = logging.getLogger(__name__)

CALIBRATION_INPUTS, CALIBRATION_BATCH = 256, 8
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
        receipt: What it holds.
        gates: parity, metric and golden; empty for fp32, whose own gates stand.
        engine: The TensorRT engine that was built of the graph, where that is what runs.
    """

    form: Form
    graph: Path
    how: str
    receipt: Receipt
    gates: tuple[Gate, ...] = ()
    engine: Path | None = None

    @property
    def warned(self) -> bool:
        """Whether a gate was missed, which `--parity warn` allows."""
        return any(gate.verdict == "warned" for gate in self.gates)

    def gate(self, name: str) -> Gate | None:
        """Return a gate by name."""
        return next((gate for gate in self.gates if gate.name == name), None)


def unconverted(form: Form, graph: Path) -> Candidate:
    """Return the FP32 graph as a candidate, with its receipt."""
    receipt = take_receipt(graph, form.weights)
    require_met(receipt, form.precision)
    return Candidate(form, graph, "as traced", receipt)


def convert(
    form: Form,
    bundle: Path,
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
        bundle: The bundle being written, with preprocessing and golden inputs.
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
    receipt = take_receipt(target, form.weights)
    require_met(receipt, form.precision)
    logger.info("verifying %s", form.precision)
    return Candidate(form, target, how, receipt, _pass_gates(form, bundle, target, reference, mode))


def _pass_gates(
    form: Form, bundle: Path, graph: Path, reference: Reference, mode: ParityMode
) -> tuple[Gate, ...]:
    policy = POLICIES[form.precision]
    with tempfile.TemporaryDirectory(prefix="mdpd-twin-") as scratch:
        twin = form.precision == "bf16"
        runner = OnnxRunner(write_twin(graph, Path(scratch, "twin.onnx")) if twin else graph)
        parity_gate, parity = check_reduced_parity(reference, runner, policy, mode)
        metric = check_reduced_metric(reference, runner, policy, parity, mode)
        golden = check_golden(bundle / PREPROCESSOR, bundle / GOLDEN_FILE, runner, parity)
    gates = (parity_gate, metric, golden)
    if not twin:
        return gates
    return tuple(
        Gate(gate.name, gate.verdict, f"{gate.note}; {TWIN}", gate.details) for gate in gates
    )


def material_of(
    run: Run,
    golden: Golden,
    golden_source: GoldenSource,
    *,
    autocast_python: Path | None,
    converted: Path | None,
) -> Material:
    """Gather what converters may look at; the training inputs are read only if one asks."""
    made_up = golden_source == "synthetic"
    what = "made-up golden inputs" if made_up else "golden inputs from validation"

    def calibration() -> Calibration:
        try:
            train = run.load_task_data().train
        except UserError as err:
            raise UserError(
                "int8-trt is calibrated on the run's training inputs, since made-up ones would "
                f"give wrong ranges, and they cannot be read: {err}"
            ) from err
        raws = spread_evenly(train.inputs, CALIBRATION_INPUTS)
        starts = range(0, len(raws), CALIBRATION_BATCH)
        parts = [run.preprocess(raws[start : start + CALIBRATION_BATCH]) for start in starts]
        return Calibration(f"{len(raws)} training inputs", parts)

    return Material(Calibration(what, [golden.arrays]), calibration, autocast_python, converted)
