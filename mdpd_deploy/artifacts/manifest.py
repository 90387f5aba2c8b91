"""`manifest.json`: what a bundle says of itself, and its graphs. No torch."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, model_validator

from mdpd_deploy.errors import unknown
from mdpd_deploy.runtimes.base import TASK_ID
from mdpd_deploy.tasks import KINDS

FILE = "manifest.json"
MODEL_FILE = "model.onnx"
EXTERNAL_FILE = f"{MODEL_FILE}.data"
GOLDEN_FILE = "golden.safetensors"
PARITY_FILE = "parity.json"
BARE_FILE = "bare_norms.safetensors"
PREPROCESSOR = "preprocessor"
TASKS = "tasks"  # folder of a folder per task, where a bundle answers several
MODEL, BASE = "model", "base"  # graphs that answer, and that tasks are deltas to
BASE_FILE = "base.onnx"
DELTA_FILE = "delta.safetensors"
TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a folder and of a word in a URL
SCHEMA = "2.0"  # a reader refuses a later major number, and ignores what a later minor one adds
NOTES_SCHEMA = "1"  # of the notes that a graph carries of itself
METADATA_PREFIX = "mdpd."
MOST_FILES = 20_000  # five for each of 512 tasks are 2,560


# A list of half a million wrong items would be half a million errors, with words for each.
Words = Annotated[list[str], FailFast()]


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{kind!r:.60} is no kind of task")
    return kind


Kind = Annotated[str, AfterValidator(_known)]
Fields = Annotated[list[Literal["text", "image"]], FailFast()]  # of one input, in order


class FileEntry(BaseModel):
    """One listed file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Port(BaseModel):
    """An input or output of a graph; named axes are dynamic."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: list[str | int]


class AxisRange(BaseModel):
    """The one shape spec: requests, TensorRT profiles and calibration follow it."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError("min, opt and max must not fall")
        return self


class GraphEntry(BaseModel):
    """One graph of the bundle, and what goes in and comes out.

    `precision` is its own, where it is not the bundle's. Inputs that have a default in the graph,
    as the weights that tasks replace, are not among `inputs`.
    """

    name: str = Field(pattern=TASK_NAME)
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.onnx$")
    inputs: Annotated[list[Port], FailFast()] = Field(min_length=1)
    outputs: Annotated[list[Port], FailFast()] = Field(min_length=1)
    shapes: dict[str, AxisRange]
    opset: int
    nodes: int
    precision: str | None = None


class Engine(BaseModel):
    """Whether a TensorRT engine belongs to the bundle."""

    status: Literal["not-asked", "to-build", "built"]
    reason: str = ""


class TaskEntry(BaseModel):
    """One of several tasks; what a manifest of one task says of it, under its name."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=TASK_NAME)
    task: str
    kind: Kind
    fields: Fields = Field(min_length=1)
    labels: Words
    metrics: Words = Field(min_length=1)
    data: dict[str, Any]
    preprocess: dict[str, Any]
    verification: dict[str, Any]


class Manifest(BaseModel):
    """Everything `predict`, `eval`, the benchmark and the server need to know.

    A bundle of several tasks has `kind` multi and says of each in `tasks` what stands here for
    one; fields, labels, metrics, data and preprocess of its own are empty.
    """

    model_config = ConfigDict(extra="allow")

    schema_: str = Field(alias="schema")
    task: str
    kind: Kind | Literal["multi"]
    fields: Fields
    method: str
    faded: bool
    labels: Words
    metrics: Words
    data: dict[str, Any]
    preprocess: dict[str, Any]
    tasks: Annotated[list[TaskEntry], FailFast()] = []
    graphs: Annotated[list[GraphEntry], FailFast()] = Field(min_length=1)
    pipeline: Literal["single"]
    precision: str
    runtime: Literal["onnx", "openvino"] = "onnx"  # the one that its gates were passed in
    engine: Engine
    verification: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str] = Field(max_length=MOST_FILES)
    caches: dict[str, FileEntry] = Field(max_length=MOST_FILES)
    files: dict[str, FileEntry] = Field(max_length=MOST_FILES)

    @model_validator(mode="after")
    def _one_or_many(self) -> Self:
        if (self.kind == "multi") != bool(self.tasks) or bool(self.tasks) == bool(self.metrics):
            raise ValueError("neither one task with metrics, nor several")
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise ValueError("two tasks have one name")
        files = {graph.name: graph.file for graph in self.graphs}
        wanted = {MODEL: MODEL_FILE, **({BASE: BASE_FILE} if self.tasks else {})}
        if len(files) < len(self.graphs) or {**files, **wanted} != files:
            raise ValueError(f"two graphs of one name, or no {' and no '.join(wanted.values())}")
        return self

    def graph(self, name: str = MODEL) -> GraphEntry:
        """Return a graph by its name; `UserError` names those that there are."""
        found = {graph.name: graph for graph in self.graphs}
        if name not in found:
            raise unknown("graph", name, list(found))
        return found[name]

    @property
    def needed(self) -> list[str]:
        """Files without which the bundle cannot be used."""
        graphs = [graph.file for graph in self.graphs]
        if not self.tasks:
            return [*graphs, f"{PREPROCESSOR}/preprocess.json"]
        own = ("preprocess.json", DELTA_FILE, GOLDEN_FILE)
        tasks = [f"{TASKS}/{task.name}/{file}" for task in self.tasks for file in own]
        return [*graphs, EXTERNAL_FILE, *tasks]


def upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest in the words of this schema, whichever schema it was written in."""
    return from_schema_1(plain) if plain["schema"].partition(".")[0] == "1" else plain


def from_schema_1(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of schema 1 as one of schema 2, which lists its graphs by name."""
    told = ("inputs", "outputs", "shapes", "opset", "nodes")
    kept = {name: value for name, value in plain.items() if name not in told}
    model = {name: plain[name] for name in told if name in plain}
    graphs = [{"name": MODEL, "file": MODEL_FILE, **model}]
    if plain.get("tasks"):
        kept["tasks"] = [_with_fields(task, plain["modality"]) for task in plain["tasks"]]
    kept = _with_fields(kept, plain["modality"])
    if plain.get("tasks"):
        inputs = [port for port in model["inputs"] if port["name"] != TASK_ID]
        base = {**model, "inputs": inputs, "nodes": plain["mixed"]["base_nodes"]}
        graphs.append({"name": BASE, "file": BASE_FILE, **base})
    return {**kept, "graphs": graphs, "pipeline": "single"}


def _with_fields(facts: dict[str, Any], modality: str) -> dict[str, Any]:
    """Say what one input is made of as schema 2 does."""
    kept = {name: value for name, value in facts.items() if name not in ("modality", "pair")}
    return {**kept, "fields": [modality] * (2 if facts["pair"] else 1)}


def graph_notes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what the graph file itself carries, so that a lone `.onnx` can still be understood.

    Args:
        manifest: As written; needed are task, kind, labels and preprocess, or tasks with these.
    """
    if manifest.get("tasks"):
        told = ("name", "task", "kind", "labels", "preprocess")
        tasks = [{key: task[key] for key in told} for task in manifest["tasks"]]
        return {
            f"{METADATA_PREFIX}schema": NOTES_SCHEMA,
            f"{METADATA_PREFIX}task": manifest["task"],
            f"{METADATA_PREFIX}kind": manifest["kind"],
            f"{METADATA_PREFIX}tasks": json.dumps(tasks, sort_keys=True),
        }
    return {
        f"{METADATA_PREFIX}schema": NOTES_SCHEMA,
        f"{METADATA_PREFIX}task": manifest["task"],
        f"{METADATA_PREFIX}kind": manifest["kind"],
        f"{METADATA_PREFIX}labels": json.dumps(manifest["labels"]),
        f"{METADATA_PREFIX}preprocess": json.dumps(manifest["preprocess"], sort_keys=True),
    }


def base_notes(manifest: Manifest) -> dict[str, str]:
    """Return the notes of the graph that task deltas belong to: they pin the backbone's weights."""
    return weights_note(manifest.files[EXTERNAL_FILE].sha256)


def weights_note(sha256: str) -> dict[str, str]:
    """Return the note that ties a base graph to the weights beside it."""
    return {f"{METADATA_PREFIX}weights_sha256": sha256}
