"""The bundle: what export leaves on disk, and how it is used. No torch here.

BUNDLE/manifest.json       what it is, how it was verified, SHA-256 of every other file
BUNDLE/model.onnx          the graph that answers; a bundle may hold more of them, by name
BUNDLE/model.onnx.data     weights that lie outside of the graphs, where they are large or shared
BUNDLE/preprocessor/       raw input → arrays
BUNDLE/golden.safetensors  a few raw inputs with the arrays and outputs they must give
BUNDLE/parity.json         details of the verification
BUNDLE/bare_norms.safetensors  norms of the untouched backbone, to rebuild `bare`
BUNDLE/build_engine.json, build_engine.sh   TensorRT recipe, with `--fmt trt`

Of several tasks on one backbone (`mdpd export --multi`):

BUNDLE/model.onnx          the mixed graph: `task_id` says which task each row of a batch asks
BUNDLE/base.onnx           the bare backbone, whose norms and head a run may replace
BUNDLE/tasks/NAME/         delta.safetensors, preprocess.json, golden.safetensors
BUNDLE/preprocessor/       the tokenizer that tasks share
BUNDLE/model.plan, model.plan.json, timing.cache   TensorRT engine, see `runtimes/tensorrt/cache.py`
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdpd_deploy.artifacts.golden import Golden, load_golden
from mdpd_deploy.artifacts.manifest import (
    BARE_FILE,
    BASE_FILE,
    DELTA_FILE,
    EXTERNAL_FILE,
    FILE,
    MODEL,
    MODEL_FILE,
    TASKS,
)
from mdpd_deploy.artifacts.once import OncePerProcess
from mdpd_deploy.artifacts.sealed import check_graphs, copy_listed, read_checked, reader
from mdpd_deploy.artifacts.tasks import BundleTask, choose_task, load_tasks
from mdpd_deploy.data.examples import Raw, fits, refuse_empty, words_of
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.graphs.deltas import load_delta
from mdpd_deploy.runtimes.base import TASK_ID, Forward, Outputs, Runtime, joined
from mdpd_deploy.runtimes.mixed import Swap, TaskRunner, mixed_batch
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.runtimes.openvino import OpenVinoRunner, refuse_device
from mdpd_deploy.tasks import Prediction

__all__ = [
    "Bundle",
    "BundleTask",
    "batches",
    "is_bundle",
    "load_bundle",
    "run_batches",
]
RUNTIMES = ("onnx", "openvino", "trt")


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: The folder.
        manifest: `manifest.json`, in the words of today's schema.
        tasks: What the graph answers, in the order of `task_id`.
    """

    path: Path
    manifest: dict[str, Any]
    tasks: tuple[BundleTask, ...]
    _open: OncePerProcess[Runtime] = field(default_factory=OncePerProcess, repr=False)

    @property
    def mixed(self) -> bool:
        """Whether the graph answers several tasks and takes `task_id`."""
        return "tasks" in self.manifest

    @property
    def runtime(self) -> str:
        """What its gates were passed in, and what runs it unless another is asked for."""
        return str(self.manifest.get("runtime", "onnx"))

    def precision_in(self, runtime: str | None = None) -> str:
        """Return what a runtime computes in; None = the bundle's own.

        bf16 on a CPU is how OpenVINO runs the fp32 graph, which is fp32 for every other.
        """
        precision = str(self.manifest["precision"])
        as_run = precision == "bf16" and self.runtime == "openvino"
        return "fp32" if as_run and runtime not in (None, "openvino") else precision

    def read(self, path: Path) -> bytes:
        """Return the bytes of a file of the bundle; `UserError` unless they are what was loaded."""
        return reader(self.path, self.manifest)(path)

    def copy(self, name: str, target: Path) -> None:
        """Copy a file of the bundle; raises as `read`."""
        copy_listed(self.path, self.manifest, name, target)

    def graph(self, name: str = MODEL) -> dict[str, Any]:
        """Return what the manifest says of a graph; `UserError` names those that there are."""
        graphs: dict[str, dict[str, Any]] = {
            entry["name"]: entry for entry in self.manifest["graphs"]
        }
        if name not in graphs:
            raise unknown(f"bundle {self.path}: graph", name, graphs)
        return graphs[name]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs of the graph that answers, in order."""
        return tuple(port["name"] for port in self.graph()["outputs"])

    def golden(self, task: BundleTask | None = None) -> Golden:
        """Return the golden vectors of a task, or of the only one; raises as `load_golden`."""
        path = (task or self.task()).golden
        assert path is not None
        return load_golden(path, self.read, self.output_names)

    def task(self, name: str | None = None) -> BundleTask:
        """Return a task by name, or the only one; `UserError` names the valid ones."""
        return choose_task(self.tasks, name, self.path)

    @property
    def preprocess(self) -> Preprocess:
        """Raw inputs → the graph's inputs, of the only task."""
        return self.task().preprocess

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names of the only task in index order; empty where it has none."""
        return self.task().task.labels

    @property
    def kind(self) -> str:
        """What kind of task the only one is, e.g. `classify`."""
        return self.task().task.kind

    def runner(
        self,
        device: str = "cpu",
        threads: int | None = None,
        *,
        runtime: str | None = None,
        entries: Mapping[str, str] | None = None,
        graph: str = MODEL,
    ) -> Runtime:
        """Open a graph on a device.

        Args:
            device: "cpu" or "cuda".
            threads: Threads inside one operator on the CPU; default: the CPU quota.
            entries: Further configuration entries of an ONNX Runtime session.
            runtime: "onnx"; "openvino", which needs "cpu"; "trt" for the bundle's TensorRT engine,
                which needs "cuda"; None = the one that the bundle was proved in.
            graph: Its name; an engine is of the graph `model`.

        Raises:
            UserError: If the device, the runtime, the graph or an engine for this machine is
                missing, or the runtime does not compute in the graph's precision there.
            WorkFailed: If the model does not run on the device that was asked for.
        """
        runtime = runtime or self.runtime
        if runtime not in RUNTIMES:
            raise unknown("--runtime", runtime, RUNTIMES)
        entry = self.graph(graph)
        file = self.path / entry["file"]
        precision = entry.get("precision") or self.precision_in(runtime)
        if runtime != "trt" and precision == "bf16" and self.runtime == "onnx" and device == "cpu":
            raise UserError(
                f"bundle {self.path} is bf16, made for TensorRT, and ONNX Runtime has no "
                "bfloat16 kernels on the CPU: build its engine on a GPU, or use an fp32 or "
                "int8-cpu bundle."
            )
        if runtime == "onnx":
            return OnnxRunner(file, device=device, threads=threads, entries=entries, read=self.read)
        if runtime == "openvino":
            refuse_device(device)
            return OpenVinoRunner(file, threads=threads, precision=precision, read=self.read)
        if graph != MODEL:
            raise UserError(f"--runtime trt: an engine is of the graph {MODEL!r}, not {graph!r}.")
        if device != "cuda":
            raise UserError(f"--device {device}: a TensorRT engine runs with --device cuda only.")
        from mdpd_deploy.runtimes.tensorrt.cache import open_bundle_engine

        return open_bundle_engine(self.path, self.manifest)

    def runner_of(self, task: BundleTask, runner: Runtime) -> Forward:
        """Return what maps a task's arrays to its own columns [B, C], on an open graph."""
        return TaskRunner(runner, task) if self.mixed else runner

    def swap(self, device: str = "cpu", threads: int | None = None) -> Swap:
        """Open the base graph of a bundle of several tasks, to run one task at a time.

        Raises:
            UserError: If the bundle has one task only, or the device is missing.
        """
        if not self.mixed:
            raise UserError(f"bundle {self.path} has one task: there is nothing to swap.")
        base = self.manifest["files"][BASE_FILE]["sha256"]
        deltas = {
            task.name: load_delta(self.path / TASKS / task.name / DELTA_FILE, base, self.read)
            for task in self.tasks
        }
        base_graph = self.path / BASE_FILE
        return Swap(base_graph, deltas, device=device, threads=threads, read=self.read)

    def predict(
        self,
        raws: Sequence[Raw],
        batch: int = 32,
        *,
        runner: Runtime | None = None,
        task: str | None = None,
    ) -> list[Prediction]:
        """Predict raw inputs.

        Args:
            raws: Texts, pairs of texts, image paths or pictures, as in training.
            batch: Inputs per run of the graph.
            runner: An open graph to use; default: one on the CPU, opened at the first call and kept.
            task: Which task to ask; needed where the bundle has several.

        Raises:
            UserError: For an empty text or an input of another kind, a picture that cannot be read, or a task that
                is missing or unknown.
        """
        asked = self.task(task)
        if not raws:
            return []
        self._check_kind(asked, raws)
        opened = runner or self._open.get(self.runner)
        size = min(batch, opened.max_batch or batch)
        outputs = run_batches(asked.preprocess, self.runner_of(asked, opened), raws, size)
        return asked.decode(outputs)

    def run_mixed(
        self,
        requests: Sequence[tuple[str, Raw]],
        batch: int = 32,
        *,
        runner: Runtime | None = None,
    ) -> list[Prediction]:
        """Predict inputs of several tasks, mixed within each batch.

        Args:
            requests: (task name, raw input), in any order.
            batch: Inputs per run of the graph.
            runner: An open graph to use; default: one on the CPU, opened at the first call and kept.

        Raises:
            UserError: As `predict`.
        """
        if not requests:
            return []
        asked = [(self.task(name), raw) for name, raw in requests]
        for task, raw in asked:
            self._check_kind(task, [raw])
        opened = runner or self._open.get(self.runner)
        size = min(batch, opened.max_batch or batch)
        found: list[Prediction] = []
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            arrays = mixed_batch(part)
            if not self.mixed:
                del arrays[TASK_ID]
            outputs = opened(arrays)
            for row, (task, _) in enumerate(part):
                found += task.decode({n: array[row : row + 1] for n, array in outputs.items()})
        return found

    def write_bare_graph(self, path: Path) -> Path:
        """Write the same graph with the untouched backbone's norms: the `bare` rival.

        Returns:
            `path`, for convenience.

        Raises:
            UserError: If this bundle's method changed more than norms, so that it cannot be done.
        """
        if self.mixed:
            raise UserError(
                f"bundle {self.path} answers several tasks: {BASE_FILE} is its bare graph."
            )
        if not (self.path / BARE_FILE).is_file():
            raise UserError(
                f"bundle {self.path} cannot give the bare backbone: method "
                f"{self.manifest['method']!r} changed more than norms; name the run instead."
            )
        import onnx
        from onnx import numpy_helper
        from safetensors.numpy import load

        proto = onnx.load_model_from_string(self.read(self.path / MODEL_FILE))
        bare = load(self.read(self.path / BARE_FILE))
        lost = set(bare) - {tensor.name for tensor in proto.graph.initializer}
        if lost:
            raise UserError(
                f"bundle {self.path} cannot give the bare backbone: its conversion to "
                f"{self.manifest['precision']} renamed {min(lost)}; name an fp32 bundle instead."
            )
        for tensor in proto.graph.initializer:
            if tensor.name in bare:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                values = bare[tensor.name].astype(dtype)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        path.write_bytes(proto.SerializeToString())
        if EXTERNAL_FILE in self.manifest["files"]:
            self.copy(EXTERNAL_FILE, path.parent / EXTERNAL_FILE)
        return path

    def _check_kind(self, task: BundleTask, raws: Sequence[Raw]) -> None:
        if "text" in task.fields:
            for raw in raws:
                if isinstance(raw, str | tuple) and not fits(raw, task.fields):
                    what = f"task {task.name!r}" if self.mixed else "this model"
                    raise UserError(f"{what} takes {words_of(task.fields)}: given {raw!r:.60}.")
            refuse_empty(raws)


def load_bundle(path: Path | str) -> Bundle:
    """Verify a bundle and return it; nothing in it is executed.

    Args:
        path: The folder that `mdpd export` wrote.

    Raises:
        UserError: If it is no bundle, was changed, or has an unknown schema.

    Example:
        >>> from PIL import Image
        >>> from mdpd_deploy import load_bundle
        >>> bundle = load_bundle(folder / "bundle")
        >>> (prediction,) = bundle.predict([Image.new("L", (8, 8))])
        >>> prediction.label in bundle.label_names
        True
    """
    folder = Path(path)
    plain, manifest = read_checked(folder)
    check_graphs(folder, manifest, reader(folder, plain))
    return Bundle(folder, plain, load_tasks(folder, plain, manifest))


def is_bundle(path: Path) -> bool:
    """Return whether a folder looks like a bundle (not whether it is a sound one)."""
    return (path / FILE).is_file()


def batches(raws: Sequence[Raw], size: int) -> Iterator[list[Raw]]:
    """Cut inputs into batches of at most `size`; works for lazy sequences without slices."""
    for start in range(0, len(raws), size):
        yield [raws[index] for index in range(start, min(start + size, len(raws)))]


def run_batches(
    preprocess: Preprocess, forward: Forward, raws: Sequence[Raw], batch: int
) -> Outputs:
    """Preprocess and run raw inputs batch by batch; every output by name, [len(raws), …]."""
    return joined(forward(preprocess(part)) for part in batches(raws, batch))
