"""The bundle: what export leaves on disk, and how it is used. No torch here (D27).

BUNDLE/manifest.json       what it is, how it was verified, SHA-256 of every other file
BUNDLE/model.onnx          the graph (+ model.onnx.data when the weights are large)
BUNDLE/preprocessor/       raw input → arrays
BUNDLE/golden.safetensors  a few raw inputs with the arrays and outputs they must give
BUNDLE/parity.json         details of the verification
BUNDLE/bare_norms.safetensors  norms of the untouched backbone, to rebuild `bare`
BUNDLE/build_engine.json, build_engine.sh   TensorRT recipe, with `--fmt trt`
BUNDLE/model.plan, model.plan.json, timing.cache   TensorRT engine, see `engine_cache.py`
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.preprocess import Preprocess, load_preprocess
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.manifest import (
    BARE_FILE,
    EXTERNAL_FILE,
    FILE,
    MODEL_FILE,
    PREPROCESSOR,
    Manifest,
    check_graph,
    read_checked,
)
from mdpd_deploy.runner import OnnxRunner, Runner

RUNTIMES = ("onnx", "trt")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input.

    Attributes:
        label: The most probable class; None for regression.
        probability: Its probability; None for regression.
        score: The predicted value in the label's unit; None for classification.
        probabilities: Every class with its probability, most probable first.
    """

    label: str | None
    probability: float | None
    score: float | None
    probabilities: Mapping[str, float]

    def to_json(self, top: int = 1) -> dict[str, Any]:
        """Return plain values: the score, or the label with the `top` most probable classes."""
        if self.score is not None:
            return {"score": self.score}
        best = list(self.probabilities.items())[:top]
        return {
            "label": self.label,
            "probability": self.probability,
            "top": [{"label": label, "probability": share} for label, share in best],
        }


@dataclass(frozen=True, eq=False)
class Task:
    """One task that a bundle's graph answers.

    Attributes:
        name: As requests name it.
        index: The row's `task_id`, where the graph takes one.
        kind: "classify" or "regress".
        label_names: Class names in index order; empty for regression.
        pair: Whether an input is a pair of texts.
        preprocess: Raw inputs → the graph's inputs, but for `task_id`.
    """

    name: str
    index: int
    kind: str
    label_names: tuple[str, ...]
    pair: bool
    preprocess: Preprocess

    @property
    def width(self) -> int:
        """How many of the graph's output columns belong to the task, counted from the first."""
        return len(self.label_names) or 1


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: The folder.
        manifest: `manifest.json` as read.
        preprocess: Raw inputs → the graph's inputs.
        label_names: Class names in index order; empty for regression.
        kind: "classify" or "regress".
    """

    path: Path
    manifest: dict[str, Any]
    preprocess: Preprocess
    label_names: tuple[str, ...]
    kind: str

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the graph answers, in the order of `task_id`."""
        name = self.manifest["task"].rpartition("/")[2]
        pair = bool(self.manifest["pair"])
        return (Task(name, 0, self.kind, self.label_names, pair, self.preprocess),)

    def runner(
        self, device: str = "cpu", threads: int | None = None, *, runtime: str = "onnx"
    ) -> Runner:
        """Open the model on a device.

        Args:
            device: "cpu" or "cuda".
            threads: Threads inside one operator on the CPU; default: the CPU quota.
            runtime: "onnx", or "trt" for the bundle's TensorRT engine, which needs "cuda".

        Raises:
            UserError: If the device, the runtime or an engine for this machine is missing.
            WorkFailed: If the model does not run on the device that was asked for.
        """
        if runtime not in RUNTIMES:
            raise unknown("--runtime", runtime, RUNTIMES)
        if runtime == "onnx":
            return OnnxRunner(self.path / MODEL_FILE, device=device, threads=threads)
        if device != "cuda":
            raise UserError(f"--device {device}: a TensorRT engine runs with --device cuda only.")
        from mdpd_deploy.engine_cache import open_bundle_engine

        return open_bundle_engine(self.path, self.manifest)

    def predict(
        self, raws: Sequence[Raw], batch: int = 32, *, runner: Runner | None = None
    ) -> list[Prediction]:
        """Predict raw inputs.

        Args:
            raws: Texts, pairs of texts, image paths or pictures, as in training.
            batch: Inputs per run of the graph.
            runner: An open graph to use; default: one is opened on the CPU.

        Raises:
            UserError: For an input of the wrong kind or a picture that cannot be read.
        """
        if not raws:
            return []
        self._check_kind(raws)
        outputs = run_batches(self.preprocess, runner or self.runner(), raws, batch)
        return [to_prediction(row, self.label_names) for row in outputs]

    def write_bare_graph(self, path: Path) -> Path:
        """Write the same graph with the untouched backbone's norms: the `bare` rival (D23).

        Returns:
            `path`, for convenience.

        Raises:
            UserError: If this bundle's method changed more than norms, so that it cannot be done.
        """
        if not (self.path / BARE_FILE).is_file():
            raise UserError(
                f"bundle {self.path} cannot give the bare backbone: method "
                f"{self.manifest['method']!r} changed more than norms; name the run instead."
            )
        import onnx
        from onnx import numpy_helper
        from safetensors.numpy import load_file

        proto = onnx.load(self.path / MODEL_FILE, load_external_data=False)
        bare = load_file(self.path / BARE_FILE)
        for tensor in proto.graph.initializer:
            if tensor.name in bare:
                tensor.CopyFrom(numpy_helper.from_array(bare[tensor.name], tensor.name))
        path.write_bytes(proto.SerializeToString())
        external = self.path / EXTERNAL_FILE
        if external.is_file():
            shutil.copyfile(external, path.parent / EXTERNAL_FILE)
        return path

    def _check_kind(self, raws: Sequence[Raw]) -> None:
        if self.manifest["modality"] == "text":
            pair = bool(self.manifest["pair"])
            for raw in raws:
                if isinstance(raw, str | tuple) and isinstance(raw, tuple) != pair:
                    wanted = "pairs of texts" if pair else "single texts"
                    raise UserError(f"this model takes {wanted}: given {raw!r:.60}.")


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
    check_graph(folder, manifest)
    preprocess = load_preprocess(folder / PREPROCESSOR)
    _check_preprocess(folder, manifest, preprocess)
    return Bundle(folder, plain, preprocess, tuple(manifest.labels), manifest.kind)


def is_bundle(path: Path) -> bool:
    """Return whether a folder looks like a bundle (not whether it is a sound one)."""
    return (path / FILE).is_file()


def batches(raws: Sequence[Raw], size: int) -> Iterator[list[Raw]]:
    """Cut inputs into batches of at most `size`; works for lazy sequences without slices."""
    for start in range(0, len(raws), size):
        yield [raws[index] for index in range(start, min(start + size, len(raws)))]


def run_batches(
    preprocess: Preprocess, runner: Runner, raws: Sequence[Raw], batch: int
) -> NDArray[np.float32]:
    """Preprocess and run raw inputs batch by batch; outputs [len(raws), C]."""
    size = min(batch, runner.max_batch or batch)
    return np.concatenate([runner(preprocess(part)) for part in batches(raws, size)])


def to_prediction(outputs: NDArray[np.float32], label_names: Sequence[str]) -> Prediction:
    """Turn one row of outputs [C] into a prediction."""
    if not label_names:
        return Prediction(None, None, float(outputs[0]), {})
    logits = outputs.astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-logits, kind="stable")  # shares of far logits are all 0
    ranked = {label_names[int(index)]: float(shares[index]) for index in order}
    best = int(order[0])
    return Prediction(label_names[best], float(shares[best]), None, ranked)


def _check_preprocess(folder: Path, manifest: Manifest, preprocess: Preprocess) -> None:
    written = json.loads((folder / PREPROCESSOR / "preprocess.json").read_text(encoding="utf-8"))
    inputs = tuple(port.name for port in manifest.inputs)
    if written != manifest.preprocess or inputs != preprocess.input_names:
        raise UserError(
            f"bundle {folder}: {PREPROCESSOR}/ contradicts {FILE}; export the run again."
        )
