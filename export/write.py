"""From a run to a verified bundle: fade, trace, pass every gate, seal, rename into place."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.artifacts.bundle import Bundle, is_bundle, load_bundle
from mdpd_deploy.artifacts.folders import atomic_folder, refuse_nonempty
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.manifest import (
    BARE_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    PARITY_FILE,
    PREPROCESSOR,
    graph_notes,
)
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.artifacts.sealed import seal
from mdpd_deploy.artifacts.tasks import meaning_of
from mdpd_deploy.checks import golden, metric, parity, verification
from mdpd_deploy.checks.policy import ParityMode
from mdpd_deploy.checks.reference import Measured, Reference
from mdpd_deploy.checks.subject import Seen
from mdpd_deploy.data.examples import Split
from mdpd_deploy.data.preprocess import load_preprocess
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.export.fade import (
    Faded,
    bare_norms,
    fade,
    prove_identity,
    prove_side_free,
)
from mdpd_deploy.export.golden import make_golden
from mdpd_deploy.export.manifest import manifest_of
from mdpd_deploy.export.options import ExportOptions
from mdpd_deploy.export.precision.choose import Draft, choose_precision
from mdpd_deploy.export.precision.trials import TimeGraphs
from mdpd_deploy.export.tensorrt.install import engine_state, install_if_possible, refit_names
from mdpd_deploy.export.tensorrt.options import EngineOptions
from mdpd_deploy.export.tensorrt.profiles import profile_shapes
from mdpd_deploy.export.tensorrt.recipe import write_recipe
from mdpd_deploy.files import write_json
from mdpd_deploy.graphs.trace import OnnxGraph, export_onnx
from mdpd_deploy.runtimes.onnx import OnnxRunner

logger = logging.getLogger(__name__)


def write_bundle(
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
        manifest = _write_beside(run, faded, graph, folder, options)
        write_golden(run, faded, validation, options, folder / GOLDEN_FILE)
        reference = Reference(
            faded.model,
            load_preprocess(folder / PREPROCESSOR),
            load_golden(folder / GOLDEN_FILE, names=graph.output_names),
            measured_on(run, validation, options),
        )
        batch = options.engine.static_batch
        profiles = profile_shapes(manifest["graphs"][0], static_batch=batch)
        draft = Draft(run, reference, graph, folder, profiles)
        passed = _pass_gates(faded, graph, reference, options.parity)
        chosen = choose_precision(draft, passed, options, time_graphs)
        manifest |= chosen.manifest
        manifest["graphs"][0] |= chosen.graph
        if options.fmt == "trt":  # again, for the precision that auto has chosen
            write_engine_recipe(folder, manifest, options.engine)
        _write_notes(graph.path, graph_notes(manifest))  # a converted graph has lost them
        manifest["verification"] = verdicts(chosen.gates)
        meaning = {"meaning": meaning_of(folder, manifest)}
        write_json(folder / PARITY_FILE, chosen.details | meaning)
        seal_verified(folder, manifest, options)
    return load_bundle(out)


def seal_verified(folder: Path, manifest: dict[str, Any], options: ExportOptions) -> None:
    """Seal a bundle, check it again as `mdpd verify` does, and build the engine it asks for."""
    seal(folder, manifest)
    sealed = load_bundle(folder)
    verification.require_sound(verification.verify(verification.Subject(sealed)))
    install_if_possible(sealed, options.engine)


def verdicts(gates: Mapping[str, Seen]) -> dict[str, dict[str, str]]:
    """Return what the manifest says of each gate."""
    return {name: {"verdict": seen.verdict, "note": seen.note} for name, seen in gates.items()}


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
    manifest = manifest_of(run, faded, graph, preprocess) | {
        "precision": options.precision,
        "target": options.target,
        "parity": options.parity,
        "golden": options.golden,
        "engine": engine_state(options.fmt),
    }
    _write_bare_norms(faded, graph, folder)
    if options.fmt == "trt":
        write_engine_recipe(folder, manifest, options.engine)
    _write_notes(graph.path, graph_notes(manifest))
    return manifest


def write_engine_recipe(folder: Path, manifest: dict[str, Any], engine: EngineOptions) -> None:
    """Write the recipe of a bundle's engine, from its manifest so far."""
    profiles = profile_shapes(manifest["graphs"][0], static_batch=engine.static_batch)
    refit = refit_names(folder, manifest) if engine.refit else ()
    write_recipe(folder, manifest["precision"], profiles, engine, refit)


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


def write_golden(
    run: Run, faded: Faded, validation: Split | None, options: ExportOptions, path: Path
) -> None:
    """Write golden inputs of a run's task, with what PyTorch gives for them."""
    raws = validation.inputs if validation and options.golden == "validation" else ()
    make_golden(faded.model, run.preprocess, raws, run.fields).save(path)


def _pass_gates(
    faded: Faded, graph: OnnxGraph, reference: Reference, mode: ParityMode
) -> dict[str, Seen]:
    """Pass every gate with the FP32 graph and what was written beside it; a failing one raises."""
    runner = OnnxRunner(graph.path)
    gates = {
        "side_free": prove_side_free(faded, graph),
        "identity": prove_identity(faded, graph),
    }
    gates["parity"], compared = parity.prove(reference, runner, mode=mode)
    if reference.measured is not None:
        count = len(reference.measured.split)
        logger.info("measuring %d examples with PyTorch and ONNX Runtime", count)
    try:
        gates["metric"] = metric.prove(reference, runner, compared)
    except VerificationError as err:
        if mode == "fail":
            raise
        gates["metric"] = Seen("warned", f"{err} (--parity warn)")
    gates["golden"] = golden.prove(reference, runner, compared)
    return gates


def measured_on(run: Run, validation: Split | None, options: ExportOptions) -> Measured | None:
    """Return what the metric gate measures; None when it is not asked."""
    if not options.metric_gate:
        return None
    assert validation is not None
    reported = run.summary["metrics"]["deployed"]
    given = options.eval_data is not None
    batch = run.config.train.eval_batch
    return Measured(validation, tuple(reported), None if given else reported, batch)
