"""A Triton model repository from verified bundles.

REPOSITORY/README.md, repository.json     how to start it; what was put in
REPOSITORY/NAME/                          the graph: config.pbtxt, 1/model.onnx or 1/model.plan
REPOSITORY/NAME_preprocess/               raw inputs → the graph's inputs (Python backend)
REPOSITORY/NAME_ensemble/                 both as one model

A bundle of several tasks is the graph alone: its clients send `task_id` with every row, and each task
has a preprocessing of its own.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.folders import atomic_folder, refuse_nonempty
from mdpd_deploy.artifacts.manifest import EXTERNAL_FILE, MODEL_FILE, PREPROCESSOR, Manifest
from mdpd_deploy.errors import UserError
from mdpd_deploy.export.triton.config import (
    LABELS_FILE,
    Backend,
    Shapes,
    Signature,
    TritonOptions,
    ensemble_config,
    graph_config,
    preprocess_config,
    raw_input,
    to_pbtxt,
    warmup_file,
)
from mdpd_deploy.export.triton.preprocess import MODEL
from mdpd_deploy.export.triton.readme import readme
from mdpd_deploy.files import read_json, write_json
from mdpd_deploy.runtimes.base import TASK_ID

PLAN_FILE, KEY_FILE = "model.plan", "model.plan.json"  # an engine and what it was built for
LIST_FILE = "repository.json"
VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def write_repository(
    bundles: Mapping[str, Bundle],
    out: Path,
    options: TritonOptions | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a repository that Triton serves as it stands.

    Args:
        bundles: Verified bundles by the name each model gets.
        out: The repository; it appears whole or not at all.
        options: See `TritonOptions`.
        overwrite: Replace a repository that this function wrote.

    Returns:
        What `repository.json` says: the models with backend, inputs and outputs.

    Raises:
        UserError: If a name or option cannot be used, or `out` holds something else.
    """
    options = options or TritonOptions()
    _check_names(bundles, options)
    needed = tuple(bundle.path for bundle in bundles.values())
    refuse_nonempty(out, overwrite=overwrite, ours=is_repository, needed=needed)
    with atomic_folder(out, overwrite=overwrite) as folder:
        models = [
            model
            for name, bundle in bundles.items()
            for model in _write_models(folder, name, bundle, options)
        ]
        written = {"schema": "1.0", "models": models}
        write_json(folder / LIST_FILE, written)
        (folder / "README.md").write_text(readme(models), encoding="utf-8")
    return written


def is_repository(path: Path) -> bool:
    """Return whether `write_repository` wrote a folder."""
    return (path / LIST_FILE).is_file() and "models" in read_json(path / LIST_FILE, "repository")


def _write_models(
    folder: Path, name: str, bundle: Bundle, options: TritonOptions
) -> list[dict[str, Any]]:
    """Write the models of one bundle; return their lines of `repository.json`."""
    manifest = Manifest.model_validate(bundle.manifest)
    backend, engine = _choose(bundle, options)
    profiles = _engine_profiles(engine, bundle) if engine else _graph_profiles(manifest)
    signature = Signature(manifest.graph().inputs, manifest.graph().outputs, profiles)
    labels = () if bundle.mixed else bundle.label_names  # of several tasks, each has its own
    graph = graph_config(name, signature, backend, options, labelled=bool(labels))
    _write_config(folder / name, graph, labels)
    _copy_graph(bundle, backend, folder / name / VERSION)
    _write_warmup(bundle, signature, folder / name / "warmup")
    configs = [graph]
    if options.preprocess and not bundle.mixed:
        made = [port for port in signature.inputs if port.name in bundle.preprocess.input_names]
        raw = raw_input(manifest.fields)
        python = preprocess_config(f"{name}_preprocess", raw, made, signature, options)
        both = ensemble_config(f"{name}_ensemble", graph, python)
        _write_config(folder / python["name"], python, ())
        _write_preprocess(bundle, folder / python["name"] / VERSION)
        _write_config(folder / both["name"], both, labels)
        # Triton wants the version's folder, and a copy to an object store would lose an empty one.
        (folder / both["name"] / VERSION / ".keep").touch()
        configs += [python, both]
    return [_line_of(config, manifest, engine) for config in configs]


def _write_config(model: Path, config: dict[str, Any], labels: tuple[str, ...]) -> None:
    (model / VERSION).mkdir(parents=True)
    (model / "config.pbtxt").write_text(to_pbtxt(config), encoding="utf-8")
    if labels:  # one a line, in the order of the output's columns
        lines = "".join(f"{' '.join(label.split())}\n" for label in labels)
        (model / LABELS_FILE).write_text(lines, encoding="utf-8")


def _copy_graph(bundle: Bundle, backend: Backend, version: Path) -> None:
    """Copy the engine; or the graph, with external weights as a folder `model.onnx` that has both."""
    if backend == "tensorrt":
        bundle.copy(PLAN_FILE, version / PLAN_FILE)
        return
    target = version / MODEL_FILE
    if EXTERNAL_FILE in bundle.manifest["files"]:
        target.mkdir()
        bundle.copy(EXTERNAL_FILE, target / EXTERNAL_FILE)
        target = target / MODEL_FILE
    bundle.copy(MODEL_FILE, target)


def _write_preprocess(bundle: Bundle, version: Path) -> None:
    (version / "model.py").write_text(MODEL, encoding="utf-8")
    (version / PREPROCESSOR).mkdir()
    for name in bundle.manifest["files"]:
        if name.startswith(f"{PREPROCESSOR}/"):
            bundle.copy(name, version / name)


def _write_warmup(bundle: Bundle, signature: Signature, folder: Path) -> None:
    """Write one row of every input in each shape: a golden input, repeated to fill it.

    Real values, since a mask of zeros or a token beyond the vocabulary is no valid input.
    """
    folder.mkdir()
    first = bundle.tasks[0]
    arrays = bundle.golden(first).arrays
    arrays = {**arrays, TASK_ID: np.full(1, first.index, dtype=np.int64)}
    for _, rows in signature.rows().values():
        for port in signature.inputs:
            row = arrays[port.name][0]
            filled = np.resize(row, rows[port.name]).astype(row.dtype.newbyteorder("<"))
            (folder / warmup_file(port, rows[port.name])).write_bytes(filled.tobytes())


def _choose(bundle: Bundle, options: TritonOptions) -> tuple[Backend, dict[str, Any] | None]:
    """Return the backend, and for an engine what its key says."""
    holds_engine = all((bundle.path / name).is_file() for name in (PLAN_FILE, KEY_FILE))
    backend = options.backend or ("tensorrt" if holds_engine else "onnxruntime")
    if backend == "onnxruntime":
        return backend, None
    if not holds_engine:
        raise UserError(
            f"--backend tensorrt: {bundle.path} holds no engine; build one on the GPU machine with "
            "`mdpd build-engine`, or use --backend onnxruntime."
        )
    if options.device == "cpu":
        raise UserError("--device cpu: a TensorRT engine runs on a GPU; use --backend onnxruntime.")
    return backend, read_json(bundle.path / KEY_FILE, "engine", bundle.read)["key"]


def _graph_profiles(manifest: Manifest) -> dict[str, Shapes]:
    """Shapes from the graph's shape spec."""
    graph = manifest.graph()
    return {
        bound: {
            port.name: tuple(
                getattr(graph.shapes[axis], bound) if isinstance(axis, str) else axis
                for axis in port.shape
            )
            for port in graph.inputs
        }
        for bound in ("min", "opt", "max")
    }


def _engine_profiles(engine: Mapping[str, Any], bundle: Bundle) -> dict[str, Shapes]:
    """Shapes that the engine was built for, which may be narrower."""
    profiles = engine["profiles"]
    found: dict[str, Shapes] = {
        bound: {name: tuple(profile[bound]) for name, profile in profiles.items()}
        for bound in ("min", "opt", "max")
    }
    smallest = next(iter(found["min"].values()))[0]
    if smallest > 1:
        raise UserError(
            f"the engine of {bundle.path} takes batches of {smallest} and more, and Triton sends "
            "single requests too: build it for batches from 1."
        )
    return found


def _line_of(
    config: dict[str, Any], manifest: Manifest, engine: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a model's line of `repository.json`."""
    line = {
        "name": config["name"],
        "backend": config.get("backend", "ensemble"),
        "kind": config["instance_group"][0]["kind"] if "instance_group" in config else None,
        "max_batch_size": config["max_batch_size"],
        "inputs": config["input"],
        "outputs": config["output"],
        "task": manifest.task,
        "opset": manifest.graph().opset,
        "onnx_sha256": manifest.files[MODEL_FILE].sha256,
    }
    if manifest.tasks:
        line["tasks"] = [{"name": task.name, "labels": task.labels} for task in manifest.tasks]
    if engine:
        line["engine"] = {name: engine[name] for name in ("tensorrt", "gpu", "compute_capability")}
    return line


def _check_names(bundles: Mapping[str, Bundle], options: TritonOptions) -> None:
    endings = ("", "_preprocess", "_ensemble") if options.preprocess else ("",)
    taken: set[str] = set()
    for name in bundles:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r} cannot name a model: use letters, digits, '_', '-' and '.', "
                "for example mdpd triton flowers=BUNDLE."
            )
        for ending in endings:
            if name + ending in taken:
                raise UserError(f"two models would be named {name + ending}: choose other names.")
            taken.add(name + ending)
