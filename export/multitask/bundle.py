"""From several runs on one backbone to one verified bundle that answers all their tasks."""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.artifacts.bundle import Bundle, is_bundle, load_bundle
from mdpd_deploy.artifacts.folders import atomic_folder, refuse_nonempty
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
    seal,
)
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.artifacts.tasks import BundleTask, meaning_of, open_task
from mdpd_deploy.checks import verification
from mdpd_deploy.checks.parity import Parity
from mdpd_deploy.data.preprocess import TOKENIZER_FILE
from mdpd_deploy.errors import MdpdError, UserError
from mdpd_deploy.export.gates import Gate, Measured, check_metric
from mdpd_deploy.export.golden import make_golden
from mdpd_deploy.export.manifest import describe_run
from mdpd_deploy.export.multitask import gates as multi_gates
from mdpd_deploy.export.multitask.base_graph import BaseGraph, delta_of, export_base
from mdpd_deploy.export.multitask.runs import Member, fade_all, refuse_strangers, task_names
from mdpd_deploy.export.precision.forms import form_of
from mdpd_deploy.export.precision.weight_report import require_met, take_receipt
from mdpd_deploy.export.tensorrt.install import engine_state, install_if_possible
from mdpd_deploy.export.write import ExportOptions, read_validation, write_engine_recipe
from mdpd_deploy.files import write_json
from mdpd_deploy.graphs.deltas import Delta
from mdpd_deploy.graphs.mixed import OUTPUT, mixed_graph
from mdpd_deploy.graphs.signature import graph_signature
from mdpd_deploy.graphs.trace import OnnxGraph
from mdpd_deploy.runtimes.base import TASK_ID, Forward
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


def pack_multi(
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
        Member(name, run, faded, split)
        for name, run, faded, split in zip(chosen, runs, fade_all(runs), splits, strict=True)
    ]
    with (
        atomic_folder(out, overwrite=options.overwrite) as folder,
        tempfile.TemporaryDirectory(prefix="mdpd-multi-") as scratch,
    ):
        _write(members, folder, Path(scratch), options)
        sealed = load_bundle(folder)
        verification.require_sound(verification.verify(verification.Subject(sealed)))
        install_if_possible(sealed, options.engine)
    return load_bundle(out)


def _write(members: Sequence[Member], folder: Path, scratch: Path, options: ExportOptions) -> None:
    """Write graphs and tasks, pass every gate, and seal."""
    logger.info("tracing the backbone to ONNX")
    bare = members[0].faded.bare
    assert bare is not None
    base = export_base(bare.backbone, max(member.width for member in members), folder, scratch)
    deltas = [
        _write_task(member, folder / TASKS / member.name, base, options) for member in members
    ]
    share_tokenizer([folder / TASKS / m.name / TOKENIZER_FILE for m in members], folder)
    mixed = mixed_graph(
        onnx.load(base.path, load_external_data=False),
        [delta.fit(base.shapes) for delta in deltas],
        form="tensorrt" if options.fmt == "trt" else "explicit",
    )
    path = folder / MODEL_FILE
    graph = OnnxGraph(path, base.traced.input_names, (OUTPUT,), len(mixed.graph.node))
    facts = _describe(members, folder, graph, base, options)
    onnx.helper.set_model_props(mixed, graph_notes(facts))
    path.write_bytes(mixed.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)
    receipt = take_receipt(path, form_of("fp32", "cpu").weights)
    require_met(receipt, "fp32")
    facts |= {"receipt": receipt.to_json(), "conversion": "as traced"}
    facts["mixed"]["added_nodes"] = multi_gates.check_mixed_structure(base.path, path)
    if options.fmt == "trt":
        write_engine_recipe(folder, facts, options.engine)
    swap = Swap(base.path, {m.name: delta for m, delta in zip(members, deltas, strict=True)})
    tasks = [open_task(folder, index, entry) for index, entry in enumerate(facts["tasks"])]
    passed = _pass_gates(members, tasks, OnnxRunner(path), swap, base, scratch, options)
    for entry, gates in zip(facts["tasks"], passed, strict=True):
        entry["verification"] = {g.name: {"verdict": g.verdict, "note": g.note} for g in gates}
    facts["verification"] = _summary(passed)
    written = {"graph": graph_signature(path).digests}
    details = [
        {
            **written,
            "meaning": meaning_of(folder, entry, entry["name"]),
            **{gate.name: gate.details for gate in gates},
        }
        for entry, gates in zip(facts["tasks"], passed, strict=True)
    ]
    write_json(folder / PARITY_FILE, {m.name: d for m, d in zip(members, details, strict=True)})
    seal(folder, facts)


def _write_task(member: Member, folder: Path, base: BaseGraph, options: ExportOptions) -> Delta:
    """Write a task's preprocessing, golden inputs and delta."""
    run, model = member.run, member.faded.model
    folder.mkdir(parents=True)
    run.preprocess.save(folder)
    validation = member.validation if options.golden == "validation" else None
    raws = validation.inputs if validation else ()
    make_golden(model, run.preprocess, raws, run.fields).save(folder / GOLDEN_FILE)
    delta = delta_of(model, base.sha256)
    delta.save(folder / DELTA_FILE)
    return delta


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
    members: Sequence[Member],
    folder: Path,
    graph: OnnxGraph,
    base: BaseGraph,
    options: ExportOptions,
) -> dict[str, Any]:
    """Return the manifest without verdicts and files."""
    alone = []
    for member in members:
        written = (folder / TASKS / member.name / "preprocess.json").read_text(encoding="utf-8")
        alone.append(describe_run(member.run, member.faded, graph, json.loads(written)))
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
        "method": "+".join(dict.fromkeys(facts["method"] for facts in alone)),
        "labels": [],
        "metrics": [],
        "data": {},
        "preprocess": {},
        **{name: first[name] for name in _OF_ALL},
        "tasks": [
            {"name": member.name, **{name: facts[name] for name in _OF_A_TASK}}
            for member, facts in zip(members, alone, strict=True)
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
    members: Sequence[Member],
    tasks: Sequence[BundleTask],
    runner: OnnxRunner,
    swap: Swap,
    base: BaseGraph,
    scratch: Path,
    options: ExportOptions,
) -> list[list[Gate]]:
    """Run every gate for every task; the first that fails raises and names its task."""
    passed: list[list[Gate]] = []
    parities: list[Parity] = []
    for member, task in zip(members, tasks, strict=True):
        logger.info("verifying task %s", task.name)
        try:
            gates = multi_gates.check_structure(member.faded, base, scratch)
            own = TaskRunner(runner, task)
            both, parity = multi_gates.check_both_ways(member.faded, own, swap[task.name], task)
            gates += [*both, _check_metric(member, task, own, parity, options)]
            gates.append(multi_gates.check_golden_of(task, own, parity))
        except MdpdError as err:
            raise type(err)(f"task {task.name} of {member.run.path}: {err}") from err
        passed.append(gates)
        parities.append(parity)
    together = multi_gates.check_mixed_rows(tasks, parities, runner)
    return [[*gates, gate] for gates, gate in zip(passed, together, strict=True)]


def _check_metric(
    member: Member, task: BundleTask, runner: Forward, parity: Parity, options: ExportOptions
) -> Gate:
    if not options.metric_gate:
        return Gate("metric", "skipped", "--no-metric-gate was given")
    assert member.validation is not None
    reported = member.run.summary["metrics"]["deployed"]
    batch = member.run.config.train.eval_batch
    measured = Measured(member.validation, tuple(reported), reported, batch)
    return check_metric(member.faded.model, runner, task.preprocess, measured, parity)


def _summary(passed: Sequence[Sequence[Gate]]) -> dict[str, dict[str, str]]:
    """Return each gate's verdict, which is one for all tasks; what was seen is in `tasks`."""
    note = f"for each of {len(passed)} tasks"
    return {gate.name: {"verdict": gate.verdict, "note": note} for gate in passed[0]}
