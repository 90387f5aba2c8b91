"""One bundle, open and proven on its device: raw inputs or tensors in, outputs out."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.manifest import MODEL_FILE
from mdpd_deploy.artifacts.signing import load_signed
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.checks.golden import replay_golden
from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.runtimes.base import TASK_ID, Runtime, only
from mdpd_deploy.runtimes.openvino import PROVIDER
from mdpd_deploy.serve.core.json_body import texts_limit
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.refusal import (
    Refusal,
    draining,
    invalid,
    not_found,
    overloaded,
    shown,
)
from mdpd_deploy.serve.core.tensors import Arrays, Axis, TensorSpec, read_specs, read_value_ranges

MASK = "attention_mask"
VERSION = "1"  # a bundle is one version; another one is another bundle

# Threads of ONNX Runtime that spin while they wait take the processors from tokenising, decoding,
# HTTP and the other models.
ENTRIES = {"session.intra_op.allow_spinning": "0"}


RunnerFactory = Callable[[Bundle, CoreOptions], Runtime]


def open_runner(bundle: Bundle, options: CoreOptions) -> Runtime:
    """Open a bundle's graph, or its engine; see `Bundle.runner` for what it raises."""
    return bundle.runner(options.device, options.threads, runtime=options.runtime, entries=ENTRIES)


class ServedModel:
    """A bundle whose files, device and golden vectors were checked.

    Args:
        name: As requests name it.
        path: The bundle.
        options: Device, threads, largest batch and key.
        make_runner: Opens the graph; default what the options say.

    Attributes:
        bundle: As loaded.
        runner: The graph on its device.
        tasks: What it answers, by name.
        inputs: What the graph takes.
        outputs: What the graph gives.
        max_batch: Most rows of a run, and of a request.
        texts_limit: The most that the JSON of a plain request may hold.

    Raises:
        UserError: If the bundle is no sound one, or the device or `max_batch` is not possible.
        WorkFailed: If it does not run on the device that was asked for.
        VerificationError: If the bundle is not signed with the key, or its golden vectors do not
            come out.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        options: CoreOptions,
        make_runner: RunnerFactory = open_runner,
    ) -> None:
        self.name = name
        self.bundle, _ = load_signed(path, options.key)
        graph = self.bundle.graph()
        self.runner = make_runner(self.bundle, options)
        self._runtime = options.runtime
        self.tasks: dict[str, BundleTask] = {task.name: task for task in self.bundle.tasks}
        ranges = read_value_ranges(path / MODEL_FILE, self.bundle.read) | {
            TASK_ID: (0, len(self.tasks) - 1)
        }
        self.inputs = read_specs(graph["inputs"], graph["shapes"], ranges)
        self.outputs = read_specs(graph["outputs"], graph["shapes"], {})
        self.max_batch = self._choose_max_batch(options.max_batch)
        limits = options.limits
        self.texts_limit = texts_limit(self.max_batch, limits.text_bytes, limits.texts_bytes)
        self._pads = any(spec.name == MASK for spec in self.inputs)
        replay_golden(self.bundle, self.runner)

    @property
    def precision(self) -> str:
        """What the model is computed in here."""
        return self.bundle.precision_in(self._runtime)

    @property
    def platform(self) -> str:
        """The protocol's word for what runs the model."""
        if self.runner.provider == PROVIDER:
            return "openvino"
        on_onnx = self.runner.provider.endswith("ExecutionProvider")
        return "onnxruntime_onnx" if on_onnx else "tensorrt_plan"

    @property
    def _batch_axis(self) -> Axis:
        return self.inputs[0].axes[0]

    def _choose_max_batch(self, asked: int | None) -> int:
        low, high = self._batch_axis.low, self._batch_axis.high
        high = min(high, self.runner.max_batch or high)
        if asked is not None and asked > high:
            raise UserError(
                f"--max-batch {asked}: {self.bundle.path} was made for batches of up to {high}; "
                "use at most that."
            )
        return max(asked or high, low)

    def task(self, name: str | None) -> BundleTask:
        """Return a task by name; None means the only one. Raises `Refusal`."""
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if name is None:
            raise invalid(f"{self.name} answers several tasks: name one of {self._task_names}.")
        if name not in self.tasks:
            raise not_found(f"unknown task {shown(name)}: {self.name} answers {self._task_names}.")
        return self.tasks[name]

    @property
    def _task_names(self) -> str:
        return ", ".join(list(self.tasks)[:10]) + (", …" if len(self.tasks) > 10 else "")

    @property
    def takes_pictures(self) -> bool:
        """Whether raw inputs are pictures; else they are texts."""
        return "image" in self.bundle.tasks[0].fields

    def to_arrays(self, raws: Sequence[Raw], task: BundleTask) -> Arrays:
        """Preprocess raw inputs of one task into the graph's inputs; raises `Refusal`."""
        try:
            arrays = task.preprocess(raws)
        except UserError as err:
            raise invalid(str(err)) from err
        except WorkFailed as err:  # too little memory
            raise overloaded(str(err)) from err
        return self.with_task(arrays, task)

    def with_task(self, arrays: Arrays, task: BundleTask) -> Arrays:
        """Return preprocessed rows of one task as the graph's inputs."""
        if not self.bundle.mixed:
            return arrays
        rows = len(next(iter(arrays.values())))
        return {**arrays, TASK_ID: np.full(rows, task.index, dtype=np.int64)}

    def check(self, arrays: Arrays) -> int:
        """Check what no single input tells, and return how many rows there are.

        Raises:
            Refusal: 400 if inputs disagree on an axis, a row is masked altogether, or there are
                more rows than one run takes.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for axis, size in zip(spec.axes, arrays[spec.name].shape, strict=True):
                if axis.name and sizes.setdefault(axis.name, size) != size:
                    raise invalid(
                        f"input {spec.name!r} has {size} for {axis.name}, another input "
                        f"{sizes[axis.name]}."
                    )
        if self._pads and not arrays[MASK].any(axis=1).all():
            raise invalid(f"input {MASK!r} has a row of zeros: a row needs at least one token.")
        rows = len(arrays[self.inputs[0].name])
        if rows > self.max_batch:
            raise invalid(f"a request may have at most {self.max_batch} rows: given {rows}.")
        return rows

    def batch_key(self, arrays: Arrays) -> Hashable:
        """Return what jobs must share to be run together: the shapes, where rows are not padded."""
        if self._pads:
            return None
        return tuple(arrays[spec.name].shape[1:] for spec in self.inputs)

    @property
    def failed(self) -> str | None:
        """Why the model answers no more; None while all is well."""
        return self.runner.failed

    def run(self, jobs: Sequence[Arrays]) -> list[NDArray[np.float32]]:
        """Run jobs as one batch and return the outputs [rows, C] of each.

        Shorter rows are padded to the longest with mask 0; a graph of a fixed batch gets copies of
        the last row, which are dropped again. Raises `Refusal` where the job is at fault, or the
        runner has failed before.
        """
        if self.failed is not None:
            raise draining()
        counts = [len(job[self.inputs[0].name]) for job in jobs]
        rows = sum(counts)
        outputs = only(self.runner(self._collate(jobs, rows)))[:rows]
        if not np.isfinite(outputs).all():
            if len(jobs) > 1:  # whose it is comes out when they are run apart
                raise FloatingPointError("an output is not finite")
            raise Refusal(422, "not_finite", "the model's output for this input is not finite.")
        return np.split(outputs, np.cumsum(counts)[:-1])

    def _collate(self, jobs: Sequence[Arrays], rows: int) -> Arrays:
        arrays = {
            spec.name: _join([job[spec.name] for job in jobs], spec, self._filler(spec.name))
            for spec in self.inputs
        }
        if rows < self._batch_axis.low:
            extra = self._batch_axis.low - rows
            arrays = {
                name: np.concatenate([array, np.repeat(array[-1:], extra, axis=0)])
                for name, array in arrays.items()
            }
        return arrays

    def _filler(self, name: str) -> int:
        preprocess = next(iter(self.tasks.values())).preprocess
        if name == "input_ids" and isinstance(preprocess, TextPreprocess):
            return preprocess.pad_id
        return 0


def _join(parts: list[NDArray[Any]], spec: TensorSpec, filler: int) -> NDArray[Any]:
    """Put rows under each other, padding a varying second axis to the longest."""
    if len(spec.axes) == 2 and spec.axes[1].name is not None:
        length = max(spec.axes[1].low, *(part.shape[1] for part in parts))
        parts = [_pad(part, length, filler) for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pad(part: NDArray[Any], length: int, filler: int) -> NDArray[Any]:
    lack = length - part.shape[1]
    return np.pad(part, ((0, 0), (0, lack)), constant_values=filler) if lack else part
