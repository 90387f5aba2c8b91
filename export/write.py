"""From a run to a verified bundle: fade, trace, pass every gate, seal, rename into place."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx

from mdpd_deploy.artifacts.bundle import Bundle, is_bundle, load_bundle
from mdpd_deploy.artifacts.folders import atomic_folder, refuse_nonempty
from mdpd_deploy.artifacts.manifest import (
    BARE_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    PARITY_FILE,
    PREPROCESSOR,
    graph_notes,
    seal,
)
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.artifacts.tasks import meaning_of
from mdpd_deploy.checks import verification
from mdpd_deploy.checks.policy import ParityMode
from mdpd_deploy.data.examples import Split
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.export import gates
from mdpd_deploy.export.fade import Faded, bare_norms, fade
from mdpd_deploy.export.golden import GoldenSource, make_golden
from mdpd_deploy.export.manifest import describe_run
from mdpd_deploy.export.precision.choose import Subject, settle_precision
from mdpd_deploy.export.precision.forms import Target
from mdpd_deploy.export.precision.trials import TimeGraphs
from mdpd_deploy.export.tensorrt.install import engine_state, install_if_possible, refit_names
from mdpd_deploy.export.tensorrt.options import EngineOptions
from mdpd_deploy.export.tensorrt.profiles import profile_shapes
from mdpd_deploy.export.tensorrt.recipe import write_recipe
from mdpd_deploy.files import write_json
from mdpd_deploy.graphs.trace import OnnxGraph, export_onnx
from mdpd_deploy.runtimes.onnx import OnnxRunner

logger = logging.getLogger(__name__)

Format = Literal["onnx", "trt"]


@dataclass(frozen=True)
class ExportOptions:
    """What a user can ask of an export.

    Attributes:
        fmt: onnx, or trt: the same bundle with the recipe for a TensorRT engine, and the engine
            itself where TensorRT and a GPU are.
        eval_data: Data for the metric gate in place of the run's own.
        metric_gate: False leaves the task metric unmeasured; the manifest says so.
        golden: Where golden inputs come from.
        overwrite: Replace what lies at the target.
        precision: Of `forms.PRECISIONS`, or auto: the fastest that passes its gates.
        target: Where the bundle runs.
        parity: Whether a missed parity or metric gate fails or warns.
        autocast_python: Interpreter of the environment that holds ModelOpt.
        converted: A file that was already converted to `precision`.
        engine: How a TensorRT engine is built, with trt.
    """

    fmt: Format = "onnx"
    eval_data: str | None = None
    metric_gate: bool = True
    golden: GoldenSource = "validation"
    overwrite: bool = False
    precision: str = "fp32"
    target: Target = "cpu"
    parity: ParityMode = "fail"
    autocast_python: Path | None = None
    converted: Path | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)


def pack(
    run: Run,
    out: Path,
    options: ExportOptions,
    *,
    time_graphs: TimeGraphs | None = None,
) -> Bundle:
    """Write and return the verified bundle of a run.

    Args:
        run: A completed run.
        out: The bundle's folder; it appears only when every gate has passed.
        options: See `ExportOptions`.
        time_graphs: Times graphs against each other; needed for precision auto only.

    Raises:
        UserError: If the run, its data, `out` or what a conversion needs cannot be used.
        ExportError: If the model cannot be traced.
        VerificationError: If a gate fails.
    """
    refuse_nonempty(out, overwrite=options.overwrite, ours=is_bundle, needed=(run.path,))
    validation = read_validation(run, options)
    faded = fade(run)
    with atomic_folder(out, overwrite=options.overwrite) as folder:
        logger.info("tracing the deployed model to ONNX")
        graph = export_onnx(faded.model, folder / MODEL_FILE)
        facts = _write_beside(run, faded, graph, folder, options)
        passed = _pass_gates(run, faded, graph, validation, folder, options)
        measured = _measured(run, validation, options) if options.metric_gate else None
        profiles = profile_shapes(facts["graphs"][0], static_batch=options.engine.static_batch)
        subject = Subject(run, faded.model, graph, folder, measured, profiles)
        settled = settle_precision(subject, passed, options, time_graphs)
        facts |= settled.facts
        facts["graphs"][0] |= settled.graph
        if options.fmt == "trt":  # again, for the precision that auto has chosen
            write_engine_recipe(folder, facts, options.engine)
        _write_notes(graph.path, graph_notes(facts))  # a converted graph has lost them
        facts["verification"] = {
            gate.name: {"verdict": gate.verdict, "note": gate.note} for gate in settled.gates
        }
        meaning = {"meaning": meaning_of(folder, facts)}
        write_json(folder / PARITY_FILE, settled.details | meaning)
        seal(folder, facts)
        sealed = load_bundle(folder)
        certificate = verification.verify(verification.Subject(sealed))
        verification.require_sound(certificate)  # its certificate can be checked again
        install_if_possible(sealed, options.engine)
    return load_bundle(out)


def read_validation(run: Run, options: ExportOptions) -> Split | None:
    """Return the validation examples, or None when nothing of the export asks for them."""
    if not options.metric_gate and options.golden == "synthetic":
        return None
    try:
        return run.load_evaluation(options.eval_data)["validation"]
    except UserError as err:
        raise UserError(
            f"{err} The run's data is needed to verify the export: if it has moved, name it with "
            "--eval-data; without it, add --no-metric-gate --golden synthetic."
        ) from err


def _write_beside(
    run: Run, faded: Faded, graph: OnnxGraph, folder: Path, options: ExportOptions
) -> dict[str, Any]:
    """Write preprocessing, bare norms, recipe and the graph's notes; return the manifest so far."""
    preprocessor = folder / PREPROCESSOR
    preprocessor.mkdir()
    run.preprocess.save(preprocessor)
    preprocess = json.loads((preprocessor / "preprocess.json").read_text(encoding="utf-8"))
    facts = describe_run(run, faded, graph, preprocess)
    facts |= {"precision": options.precision, "target": options.target, "parity": options.parity}
    facts["golden"] = options.golden
    _write_bare_norms(faded, graph, folder)
    facts["engine"] = engine_state(options.fmt)
    if options.fmt == "trt":
        write_engine_recipe(folder, facts, options.engine)
    _write_notes(graph.path, graph_notes(facts))
    return facts


def write_engine_recipe(folder: Path, facts: dict[str, Any], engine: EngineOptions) -> None:
    """Write the recipe of a bundle's engine, from its manifest so far."""
    profiles = profile_shapes(facts["graphs"][0], static_batch=engine.static_batch)
    refit = refit_names(folder, facts) if engine.refit else ()
    write_recipe(folder, facts["precision"], profiles, engine, refit)


def _write_bare_norms(faded: Faded, graph: OnnxGraph, folder: Path) -> None:
    """Keep the untouched norms under the names that the graph gives them."""
    norms = bare_norms(faded)
    if norms is None:
        return
    from safetensors.numpy import save

    proto = onnx.load(graph.path, load_external_data=False)
    lost = set(norms) - {tensor.name for tensor in proto.graph.initializer}
    if lost:
        raise VerificationError(f"identity: the graph lost the name of {min(lost)}.")
    values = {name: tensor.numpy() for name, tensor in norms.items()}
    (folder / BARE_FILE).write_bytes(save(values))  # save_file would make it private to this user


def _write_notes(path: Path, notes: dict[str, str]) -> None:
    proto = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(proto, notes)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _pass_gates(
    run: Run,
    faded: Faded,
    graph: OnnxGraph,
    validation: Split | None,
    folder: Path,
    options: ExportOptions,
) -> list[gates.Gate]:
    """Run every gate on what was written; the first that fails raises."""
    model, runner = faded.model, OnnxRunner(graph.path)
    passed = [gates.check_side_free(faded, graph), gates.check_identity(faded, graph)]
    raws = validation.inputs if validation and options.golden == "validation" else ()
    golden = make_golden(model, run.preprocess, raws, run.fields)
    golden.save(folder / GOLDEN_FILE)
    gate, parity = gates.check_parity(model, runner, golden, mode=options.parity)
    passed.append(gate)
    if options.metric_gate:
        measured = _measured(run, validation, options)
        logger.info("measuring %d examples with PyTorch and ONNX Runtime", len(measured.split))
        try:
            passed.append(gates.check_metric(model, runner, run.preprocess, measured, parity))
        except VerificationError as err:
            if options.parity == "fail":
                raise
            passed.append(gates.Gate("metric", "warned", f"{err} (--parity warn)"))
    else:
        passed.append(gates.Gate("metric", "skipped", "--no-metric-gate was given"))
    passed.append(gates.check_golden(folder / PREPROCESSOR, folder / GOLDEN_FILE, runner, parity))
    return passed


def _measured(run: Run, validation: Split | None, options: ExportOptions) -> gates.Measured:
    assert validation is not None
    reported = run.summary["metrics"]["deployed"]
    return gates.Measured(
        validation,
        tuple(reported),
        None if options.eval_data else reported,
        run.config.train.eval_batch,
    )
