"""From several runs on one backbone to one verified bundle that answers all their tasks.

Every task must pass the gates of a bundle of one (see `checks`), and two more:

swap       PyTorch's numbers from the base graph, fed with the task's delta
mixed      one batch of all tasks in random order gives each row what its task alone gives
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.artifacts.bundle import Bundle, is_bundle, load_bundle
from mdpd_deploy.artifacts.folders import atomic_folder, refuse_nonempty
from mdpd_deploy.artifacts.golden import Golden, load_golden
from mdpd_deploy.artifacts.manifest import (
    BASE,
    BASE_FILE,
    DELTA_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    PARITY_FILE,
    PREPROCESSOR,
    TASKS,
    graph_notes,
)
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.artifacts.tasks import BundleTask, meaning_of, open_task
from mdpd_deploy.checks import golden, metric, mixed, parity
from mdpd_deploy.checks.parity import FP32_TOLERANCE
from mdpd_deploy.checks.reference import Reference
from mdpd_deploy.checks.side_free import side_names
from mdpd_deploy.checks.subject import Seen
from mdpd_deploy.data.preprocess import TOKENIZER_FILE
from mdpd_deploy.errors import MdpdError, UserError, VerificationError
from mdpd_deploy.export.fade import prove_side_free
from mdpd_deploy.export.manifest import manifest_of
from mdpd_deploy.export.multitask.base_graph import BaseGraph, comparable, delta_of, export_base
from mdpd_deploy.export.multitask.runs import TaskRun, fade_all, refuse_strangers, task_names
from mdpd_deploy.export.options import ExportOptions
from mdpd_deploy.export.precision.convert import unconverted
from mdpd_deploy.export.precision.forms import form_of
from mdpd_deploy.export.tensorrt.install import engine_state
from mdpd_deploy.export.write import (
    measured_on,
    read_validation,
    seal_verified,
    verdicts,
    write_engine_recipe,
    write_golden,
)
from mdpd_deploy.files import write_json
from mdpd_deploy.graphs.deltas import HEAD_BIAS, Delta
from mdpd_deploy.graphs.mixed import OUTPUT, added_nodes, mixed_graph
from mdpd_deploy.graphs.signature import graph_signature, same_structure, values_sha256
from mdpd_deploy.graphs.trace import OnnxGraph, export_onnx
from mdpd_deploy.runtimes.base import TASK_ID
from mdpd_deploy.runtimes.mixed import Swap, TaskRunner
from mdpd_deploy.runtimes.onnx import OnnxRunner

logger = logging.getLogger(__name__)

_OF_A_TASK = (
    "task",
    "kind",
    "fields",
    "method",
    "labels",
    "metrics",
    "data",
    "preprocess",
    "source",
)
_OF_ALL = ("faded", "pipeline", "precision", "versions")


def write_bundle_of_tasks(
    runs: Sequence[Run], out: Path, options: ExportOptions, *, names: Sequence[str] | None = None
) -> Bundle:
    """Write and return the verified bundle of several runs.

    Args:
        runs: Completed runs on one backbone that changed its norms only.
        out: The bundle's folder; it appears only when every gate has passed for every task.
        options: See `ExportOptions`; format trt gives the mixed graph the form `tensorrt`.
        names: A name for each task; None = the runs' own tasks, made unique.

    Raises:
        UserError: If the runs cannot share a graph, or a run, its data, a name or `out` cannot be
            used.
        ExportError: If the model cannot be traced.
        VerificationError: If a gate fails; the message names the task.
    """
    if options.eval_data:
        raise UserError("--eval-data names the data of one task: leave it out with --multi.")
    refuse_strangers(runs)
    chosen = task_names(runs, names)
    needed = tuple(run.path for run in runs)
    refuse_nonempty(out, overwrite=options.overwrite, ours=is_bundle, needed=needed)
    splits = [read_validation(run, options) for run in runs]
    members = [
        TaskRun(name, run, faded, split)
        for name, run, faded, split in zip(chosen, runs, fade_all(runs), splits, strict=True)
    ]
    with (
        atomic_folder(out, overwrite=options.overwrite) as folder,
        tempfile.TemporaryDirectory(prefix="mdpd-multi-") as scratch,
    ):
        manifest = _write(members, folder, Path(scratch), options)
        seal_verified(folder, manifest, options)
    return load_bundle(out)


def _write(
    members: Sequence[TaskRun], folder: Path, scratch: Path, options: ExportOptions
) -> dict[str, Any]:
    """Write graphs and tasks and pass every gate; return the manifest."""
    logger.info("tracing the backbone to ONNX")
    bare = members[0].faded.bare
    assert bare is not None
    base = export_base(bare.backbone, max(member.width for member in members), folder, scratch)
    deltas = {
        member.name: _write_task(member, folder / TASKS / member.name, base, options)
        for member in members
    }
    share_tokenizer([folder / TASKS / m.name / TOKENIZER_FILE for m in members], folder)
    path = folder / MODEL_FILE
    manifest = _write_mixed(members, deltas, folder, base, options)
    if options.fmt == "trt":
        write_engine_recipe(folder, manifest, options.engine)
    tasks = [open_task(folder, index, entry) for index, entry in enumerate(manifest["tasks"])]
    swap = Swap(base.path, deltas)
    passed = _pass_gates(members, tasks, OnnxRunner(path), swap, base, scratch, options)
    details, written = {}, {"graph": graph_signature(path).digests}
    for entry, gates in zip(manifest["tasks"], passed, strict=True):
        entry["verification"] = verdicts(gates)
        meaning = {"meaning": meaning_of(folder, entry, entry["name"])}
        numbers = {name: seen.details for name, seen in gates.items()}
        details[entry["name"]] = written | meaning | numbers
    note = f"for each of {len(passed)} tasks"
    told = verdicts(passed[0])
    manifest["verification"] = {name: {**verdict, "note": note} for name, verdict in told.items()}
    write_json(folder / PARITY_FILE, details)
    return manifest


def _write_task(member: TaskRun, folder: Path, base: BaseGraph, options: ExportOptions) -> Delta:
    """Write a task's preprocessing, golden inputs and delta."""
    folder.mkdir(parents=True)
    member.run.preprocess.save(folder)
    write_golden(member.run, member.faded, member.validation, options, folder / GOLDEN_FILE)
    delta = delta_of(member.faded.model, base.sha256)
    delta.save(folder / DELTA_FILE)
    return delta


def _write_mixed(
    members: Sequence[TaskRun],
    deltas: dict[str, Delta],
    folder: Path,
    base: BaseGraph,
    options: ExportOptions,
) -> dict[str, Any]:
    """Write the mixed graph; return the manifest without verdicts and files."""
    proto = onnx.load(base.path, load_external_data=False)
    fitted = [delta.fit(base.shapes) for delta in deltas.values()]
    made = mixed_graph(proto, fitted, form="tensorrt" if options.fmt == "trt" else "explicit")
    path = folder / MODEL_FILE
    graph = OnnxGraph(path, base.traced.input_names, (OUTPUT,), len(made.graph.node))
    manifest = _describe(members, folder, graph, base, options)
    onnx.helper.set_model_props(made, graph_notes(manifest))
    path.write_bytes(made.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)
    checked = unconverted(form_of("fp32", "cpu"), path)
    manifest |= {"receipt": checked.report.to_json(), "conversion": checked.how}
    for stray in (*side_names(proto), *side_names(made)):
        raise VerificationError(f"side_free: {stray} belongs to the side network.")
    manifest["mixed"]["added_nodes"] = added_nodes(proto, made)
    return manifest


def share_tokenizer(files: Sequence[Path], folder: Path) -> None:
    """Keep one copy of equal tokenizers; how far a task truncates is in its `preprocess.json`.

    Args:
        files: The tokenizer of each task; those equal to the first go.
        folder: The bundle, which gets the first one.
    """
    if not files[0].is_file():
        return
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for content in contents:
        (content["truncation"] or {}).pop("max_length", None)
    (folder / PREPROCESSOR).mkdir()
    files[0].rename(folder / PREPROCESSOR / TOKENIZER_FILE)
    for file, content in zip(files[1:], contents[1:], strict=True):
        if content == contents[0]:
            file.unlink()


def _describe(
    members: Sequence[TaskRun],
    folder: Path,
    graph: OnnxGraph,
    base: BaseGraph,
    options: ExportOptions,
) -> dict[str, Any]:
    """Return the manifest without verdicts and files."""
    alone = []
    for member in members:
        written = (folder / TASKS / member.name / "preprocess.json").read_text(encoding="utf-8")
        alone.append(manifest_of(member.run, member.faded, graph, json.loads(written)))
    first, *others = alone
    (model,) = first["graphs"]
    bounds = model["shapes"]
    for other in others:
        for axis, limits in other["graphs"][0]["shapes"].items():
            bounds[axis] = {bound: max(bounds[axis][bound], limits[bound]) for bound in limits}
    (output,) = model["outputs"]
    output["shape"] = ["batch", max(member.width for member in members)]
    task_id = {"name": TASK_ID, "dtype": "int64", "shape": ["batch"]}
    return {
        "task": "+".join(member.name for member in members),
        "kind": "multi",
        "fields": [],
        "method": "+".join(dict.fromkeys(one["method"] for one in alone)),
        "labels": [],
        "metrics": [],
        "data": {},
        "preprocess": {},
        **{name: first[name] for name in _OF_ALL},
        "tasks": [
            {"name": member.name, **{name: one[name] for name in _OF_A_TASK}}
            for member, one in zip(members, alone, strict=True)
        ],
        "graphs": [
            {**model, "inputs": [*model["inputs"], task_id]},
            {**model, "name": BASE, "file": BASE_FILE, "nodes": base.traced.nodes},
        ],
        "mixed": {"base_sha256": base.sha256},
        "engine": engine_state(options.fmt),
        "golden": options.golden,
        "source": {"backbone": first["source"]["backbone"]},
    }


def _pass_gates(
    members: Sequence[TaskRun],
    tasks: Sequence[BundleTask],
    runner: OnnxRunner,
    swap: Swap,
    base: BaseGraph,
    scratch: Path,
    options: ExportOptions,
) -> list[dict[str, Seen]]:
    """Pass every gate with every task; the first that fails raises and names its task."""
    passed: list[dict[str, Seen]] = []
    goldens: list[Golden] = []
    spreads: list[float] = []
    for member, task in zip(members, tasks, strict=True):
        logger.info("verifying task %s", task.name)
        try:
            assert task.golden is not None
            expected = load_golden(task.golden, names=(OUTPUT,))
            measured = measured_on(member.run, member.validation, options)
            reference = Reference(member.faded.model, task.preprocess, expected, measured)
            own = TaskRunner(runner, task)
            gates = _prove_structure(member, base, scratch)
            gates["parity"], compared = parity.prove(reference, own, names=(OUTPUT,))
            gates["swap"], _ = parity.prove(reference, swap[task.name], names=(OUTPUT,))
            gates["metric"] = metric.prove(reference, own, compared)
            gates["golden"] = golden.prove(reference, own, compared)
        except MdpdError as err:
            raise type(err)(f"task {task.name} of {member.run.path}: {err}") from err
        passed.append(gates)
        goldens.append(expected)
        spreads.append(compared.spread[OUTPUT])
    together = mixed.prove(tasks, goldens, spreads, runner, FP32_TOLERANCE)
    return [gates | {"mixed": seen} for gates, seen in zip(passed, together, strict=True)]


def _prove_structure(member: TaskRun, base: BaseGraph, scratch: Path) -> dict[str, Seen]:
    """Trace the task's model anew and compare it with the base graph: `side_free` and `identity`."""
    (width,) = base.shapes[HEAD_BIAS]
    twin = replace(member.faded, model=comparable(member.faded.model, width))
    graph = export_onnx(twin.model, scratch / "task.onnx")
    differences = same_structure(graph.path, base.traced.path)
    if differences:
        raise VerificationError(f"identity: the graph is not the base graph: {differences[0]}.")
    changed, bare = member.faded.changed, graph_signature(base.path)
    details = {
        "nodes": graph.nodes,
        "changed_weights": list(changed),
        "structure_sha256": bare.structure_sha256,
        "bare_values_sha256": values_sha256(weight.digest for weight in bare.weights),
    }
    note = f"{graph.nodes} nodes equal the bare backbone's; {len(changed)} norms differ"
    return {
        "side_free": prove_side_free(twin, graph),
        "identity": Seen("passed", note, details),
    }
