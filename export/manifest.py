"""What a bundle's manifest says of a run: no absolute path of the training machine gets in."""

import json
from pathlib import Path
from typing import Any

from mdpd_deploy.artifacts.manifest import MODEL, MODEL_FILE
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.export.fade import Faded
from mdpd_deploy.graphs.trace import OPSET, OnnxGraph
from mdpd_deploy.machine import versions

BATCHES = {"min": 1, "opt": 8, "max": 32}  # for engines and servers; the ONNX graph takes any batch
OPT_TOKENS = 128
HUB = "hub:"


def manifest_of(
    run: Run, faded: Faded, graph: OnnxGraph, preprocess: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest without schema, engine, verdicts and files."""
    return {
        "task": run.config.task,
        "kind": run.task.kind,
        "fields": list(run.fields),
        "method": run.config.method,
        "faded": faded.faded,
        "labels": list(run.task.labels),
        "metrics": list(run.summary["metrics"]["deployed"]),
        "data": _data_options(run),
        "preprocess": preprocess,
        "graphs": [_graph_entry(run, graph)],
        "pipeline": "single",
        "precision": "fp32",
        "source": {
            "run": run.path.resolve().name,
            "config_sha256": run.config.sha256(),
            "backbone": _without_paths(run.summary["backbone"]),
            "side": _without_paths(run.summary.get("side")),
            "seed": run.config.train.seed,
        },
        "versions": versions(),
    }


def _graph_entry(run: Run, graph: OnnxGraph) -> dict[str, Any]:
    """Return the graph's own part of the manifest: its ports and the range of every named axis."""
    classes = run.task.width
    preprocess = run.preprocess
    shapes = {"batch": dict(BATCHES)}
    dims: tuple[str | int, ...]
    if isinstance(preprocess, ImagePreprocess):
        dtype, dims = "float32", (3, *preprocess.size)
    else:
        longest = preprocess.max_length
        dtype, dims = "int64", ("sequence",)
        shapes["sequence"] = {"min": 1, "opt": min(OPT_TOKENS, longest), "max": longest}
    return {
        "name": MODEL,
        "file": MODEL_FILE,
        "inputs": [
            {"name": n, "dtype": dtype, "shape": ["batch", *dims]} for n in graph.input_names
        ],
        "outputs": [
            {"name": n, "dtype": "float32", "shape": ["batch", classes]} for n in graph.output_names
        ],
        "shapes": shapes,
        "opset": OPSET,
        "nodes": graph.nodes,
    }


def _data_options(run: Run) -> dict[str, Any]:
    """Return what `eval BUNDLE` needs to read data as training did, but for where it lies."""
    options = run.config.data.model_dump(mode="json", exclude={"path", "eval_path", "labels"})
    path = run.config.data.path
    if path is not None and path.startswith(HUB):
        options["path"] = path
    return {"columns": list(run.columns), "seed": run.config.train.seed, "options": options}


def _without_paths(value: Any) -> Any:
    """Cut absolute paths down to their last part, at any depth."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, str):
        prefix, colon, rest = value.partition(":")
        if colon and Path(rest).is_absolute():
            return f"{prefix}:{Path(rest).name}"
        return Path(value).name if Path(value).is_absolute() else value
    return json.loads(json.dumps(value))
