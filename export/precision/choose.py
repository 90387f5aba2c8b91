"""Puts the precision that was asked for in the place of the FP32 graph, whose gates have passed."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import onnx

from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.manifest import GOLDEN_FILE
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.checks.policy import POLICIES, ParityMode
from mdpd_deploy.export.gates import Gate, Measured
from mdpd_deploy.export.golden import GoldenSource
from mdpd_deploy.export.precision.convert import Candidate, convert, material_of, unconverted
from mdpd_deploy.export.precision.forms import AUTO, Form, Target, form_of, forms_for
from mdpd_deploy.export.precision.gates import Reference
from mdpd_deploy.export.precision.trials import TimeGraphs, try_all
from mdpd_deploy.export.tensorrt.options import EngineOptions
from mdpd_deploy.export.tensorrt.profiles import Profiles
from mdpd_deploy.export.tensorrt.trials import with_engine
from mdpd_deploy.graphs.signature import graph_signature
from mdpd_deploy.graphs.trace import OnnxGraph
from mdpd_deploy.model import TaskModel

BEFORE = "proved on the FP32 graph before conversion"


class Asked(Protocol):
    """What of the export's options decides here; see `ExportOptions`."""

    @property
    def precision(self) -> str: ...
    @property
    def target(self) -> Target: ...
    @property
    def parity(self) -> ParityMode: ...
    @property
    def golden(self) -> GoldenSource: ...
    @property
    def autocast_python(self) -> Path | None: ...
    @property
    def converted(self) -> Path | None: ...
    @property
    def engine(self) -> EngineOptions: ...


@dataclass(frozen=True, eq=False)
class Subject:
    """A bundle in the making.

    Attributes:
        run: Where it comes from.
        model: What is deployed, FP32 on the CPU.
        graph: Its verified FP32 graph, in the bundle.
        folder: The bundle, with preprocessing and golden inputs.
        measured: Validation examples; None when the metric is not measured.
        profiles: Ranges of shapes that a TensorRT engine of it takes.
    """

    run: Run
    model: TaskModel
    graph: OnnxGraph
    folder: Path
    measured: Measured | None
    profiles: Profiles


@dataclass(frozen=True)
class Settled:
    """What the bundle holds now.

    Attributes:
        gates: Its verdicts.
        facts: For the manifest.
        graph: For the graph's entry there.
        details: All of `parity.json`.
    """

    gates: list[Gate]
    facts: dict[str, Any]
    graph: dict[str, int]
    details: dict[str, Any]


def settle_precision(
    subject: Subject, passed: Sequence[Gate], asked: Asked, time_graphs: TimeGraphs | None
) -> Settled:
    """Convert, verify and install the graph of the precision asked for.

    Args:
        subject: The bundle; its graph is replaced.
        passed: Verdicts of the FP32 graph.
        asked: Options of the export.
        time_graphs: Times graphs against each other; needed for precision auto only.

    Raises:
        UserError: If something that a conversion needs is missing.
        ExportError: If the conversion fails or its result is not what was asked for.
        VerificationError: If a gate fails.
    """
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mdpd-precision-") as scratch:
        maker = _Maker(subject, asked, Path(scratch))
        if asked.precision == AUTO:
            assert time_graphs is not None
            tried = try_all(forms_for(asked.target), maker.make_to_time, time_graphs)
            chosen, facts["precision_trials"] = tried.chosen, tried.table
        else:
            chosen = maker.make(form_of(asked.precision, asked.target))
        if chosen.gates:
            shutil.copyfile(chosen.graph, subject.graph.path)
    receipt, precision = chosen.receipt.to_json(), chosen.form.precision
    proto = onnx.load(subject.graph.path, load_external_data=False)
    facts |= {"precision": precision, "receipt": receipt, "conversion": chosen.how}
    graph = {
        "nodes": len(proto.graph.node),
        "opset": next(entry.version for entry in proto.opset_import if not entry.domain),
    }
    gates = _verdicts(passed, chosen)
    policy = {"mode": asked.parity, "precision": precision, **POLICIES[precision].to_json()}
    details = {gate.name: gate.details for gate in gates} | {"receipt": receipt, "policy": policy}
    details["graph"] = graph_signature(subject.graph.path).digests
    if chosen.gates:
        renewed = {gate.name for gate in chosen.gates}
        details["before_conversion"] = {g.name: g.details for g in passed if g.name in renewed}
    return Settled(gates, facts, graph, details)


class _Maker:
    """Makes one form after the other; PyTorch's outputs are computed once for all."""

    def __init__(self, subject: Subject, asked: Asked, scratch: Path) -> None:
        golden = load_golden(subject.folder / GOLDEN_FILE)
        run = subject.run
        self._subject, self._asked, self._scratch = subject, asked, scratch
        self._golden = golden
        self._reference = Reference(subject.model, run.preprocess, golden, subject.measured)
        self._material = material_of(
            run,
            golden,
            asked.golden,
            autocast_python=asked.autocast_python,
            converted=asked.converted,
        )

    def make(self, form: Form) -> Candidate:
        if form.convert is None:
            return unconverted(form, self._subject.graph.path)
        return convert(
            form,
            self._subject.folder,
            self._subject.graph.path,
            self._scratch / f"{form.precision}.onnx",
            material=self._material,
            reference=self._reference,
            mode=self._asked.parity,
        )

    def make_to_time(self, form: Form) -> Candidate:
        """Make a form as the target runs it: on a GPU with its engine."""
        made = self.make(form)
        if self._asked.target == "cpu":
            return made
        profiles, options = self._subject.profiles, self._asked.engine
        return with_engine(made, self._scratch, self._golden, profiles, options)


def _verdicts(passed: Sequence[Gate], chosen: Candidate) -> list[Gate]:
    """Return the FP32 verdicts, those that the conversion touches replaced by its own."""
    if not chosen.gates:
        return list(passed)
    renewed = {gate.name: gate for gate in chosen.gates}
    kept = (
        replace(gate, note=f"{gate.note}; {BEFORE}") if gate.verdict == "passed" else gate
        for gate in passed
    )
    return [renewed.get(gate.name, gate) for gate in kept]
