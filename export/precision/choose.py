"""The precision of a bundle: the one asked for, or of several the fastest that passes its gates."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.checks.policy import POLICIES
from mdpd_deploy.checks.reference import Reference
from mdpd_deploy.checks.subject import Seen
from mdpd_deploy.export.options import ExportOptions
from mdpd_deploy.export.precision.convert import Candidate, convert, run_by_openvino, unconverted
from mdpd_deploy.export.precision.forms import AUTO, Form, form_of, forms_for
from mdpd_deploy.export.precision.material import material_of
from mdpd_deploy.export.precision.trials import TimeGraphs, try_all
from mdpd_deploy.export.tensorrt.profiles import Profiles
from mdpd_deploy.export.tensorrt.trials import with_engine
from mdpd_deploy.graphs.signature import graph_signature
from mdpd_deploy.graphs.trace import OnnxGraph

BEFORE = "proved on the FP32 graph before conversion"


@dataclass(frozen=True, eq=False)
class Draft:
    """A bundle in the making.

    Attributes:
        run: Where it comes from.
        reference: What is deployed, FP32 on the CPU, and what its metric is measured on.
        graph: Its FP32 graph, in the bundle.
        folder: The bundle.
        profiles: Ranges of shapes that a TensorRT engine of it takes.
    """

    run: Run
    reference: Reference
    graph: OnnxGraph
    folder: Path
    profiles: Profiles


@dataclass(frozen=True)
class Choice:
    """The outcome, in the words of the bundle's files.

    Attributes:
        gates: What its gates saw, by name.
        manifest: For the manifest.
        graph: For the graph's entry there.
        details: All of `parity.json`.
    """

    gates: dict[str, Seen]
    manifest: dict[str, Any]
    graph: dict[str, int]
    details: dict[str, Any]


def choose_precision(
    draft: Draft, passed: Mapping[str, Seen], asked: ExportOptions, time_graphs: TimeGraphs | None
) -> Choice:
    """Convert, verify and put into the bundle the graph of the precision asked for.

    Args:
        draft: The bundle; its graph is replaced.
        passed: What the gates saw of the FP32 graph.
        asked: Options of the export.
        time_graphs: Times graphs against each other; needed for precision auto only.

    Raises:
        UserError: If something that a conversion needs is missing.
        ExportError: If the conversion fails or its result is not what was asked for.
        VerificationError: If a gate fails.
    """
    manifest: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mdpd-precision-") as scratch:
        make = partial(_make, draft, asked, Path(scratch))
        if asked.precision == AUTO:
            assert time_graphs is not None
            tried = try_all(forms_for(asked.target), partial(make, to_time=True), time_graphs)
            chosen, manifest["precision_trials"] = tried.chosen, tried.table
        else:
            chosen = make(form_of(asked.precision, asked.target))
        if chosen.graph != draft.graph.path:
            shutil.copyfile(chosen.graph, draft.graph.path)
    report, precision = chosen.report.to_json(), chosen.form.precision
    proto = onnx.load(draft.graph.path, load_external_data=False)
    graph = {
        "nodes": len(proto.graph.node),
        "opset": next(entry.version for entry in proto.opset_import if not entry.domain),
    }
    manifest |= {"precision": precision, "receipt": report, "conversion": chosen.how}
    manifest["runtime"] = chosen.form.runtime
    policy = {"mode": asked.parity, "precision": precision, **POLICIES[precision].to_json()}
    gates = _with_own(passed, chosen)
    details = {name: seen.details for name, seen in gates.items()}
    details |= {"receipt": report, "policy": policy}
    details["graph"] = graph_signature(draft.graph.path).digests
    if chosen.gates:
        details["before_conversion"] = {name: passed[name].details for name in chosen.gates}
    return Choice(gates, manifest, graph, details)


def _make(
    draft: Draft, asked: ExportOptions, scratch: Path, form: Form, *, to_time: bool = False
) -> Candidate:
    """Make a form; one that is to be timed for a GPU has the engine that runs there."""
    if form.runtime == "openvino" and form.convert is None:
        graph, reference = draft.graph.path, draft.reference
        made = run_by_openvino(form, graph, reference=reference, mode=asked.parity)
    elif form.convert is None:
        made = unconverted(form, draft.graph.path)
    else:
        made = convert(
            form,
            draft.graph.path,
            scratch / f"{form.precision}.onnx",
            material=material_of(draft.run, draft.reference.golden, asked),
            reference=draft.reference,
            mode=asked.parity,
        )
    if not to_time or asked.target == "cpu":
        return made
    return with_engine(made, scratch, draft.reference.golden, draft.profiles, asked.engine)


def _with_own(passed: Mapping[str, Seen], chosen: Candidate) -> dict[str, Seen]:
    """Return what was seen of the FP32 graph, replaced by what a converted graph's own gates saw."""
    if chosen.form.convert is None:
        return {**passed, **chosen.gates}
    before = {
        name: replace(seen, note=f"{seen.note}; {BEFORE}") if seen.verdict == "passed" else seen
        for name, seen in passed.items()
    }
    return before | chosen.gates
