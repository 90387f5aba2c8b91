"""Golden vectors: raw inputs with the outputs a bundle must give for them. No torch here.

They start from *raw* input, so a wrong resize, channel order or tokenizer shows at once; the
arrays in between tell which half is at fault.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.images import open_image
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import Read
from mdpd_deploy.runtimes.base import Forward, Outputs

MOST = 256  # golden inputs that are read; they run as one batch, and an export keeps 8
ONE = "output"  # what the file calls a graph's only output
LONGEST_EDGE = 640  # pixels; larger pictures are scaled down before they become golden


@dataclass(frozen=True, eq=False)
class Golden:
    """A few inputs on their whole way through the model.

    Attributes:
        raws: Texts, pairs, or RGB pictures.
        arrays: The graph's inputs by name, one batch.
        outputs: What PyTorch gave for them, by the names of the graph's outputs [n, …].
    """

    raws: tuple[Raw, ...]
    arrays: dict[str, NDArray[Any]]
    outputs: Outputs

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        from safetensors.numpy import save

        tensors = {f"input.{name}": array for name, array in self.arrays.items()}
        names = _keys(list(self.outputs))
        tensors |= {key: self.outputs[name] for name, key in names.items()}
        for index, raw in enumerate(self.raws):
            tensors.update(_raw_to_arrays(index, raw))
        whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        path.write_bytes(save(whole))  # save_file would make it private to this user


@dataclass(frozen=True)
class Replay:
    """How far a replay was from what is written, in standard deviations of the outputs.

    Infinite: another shape or name, or a value that is not finite.
    """

    preprocessing_diff: float
    output_diff: float


def keep_raw(raw: Raw) -> Raw:
    """Return a raw input in the form that golden vectors keep: pictures decoded and not too large."""
    if isinstance(raw, str | tuple):
        return raw
    image = open_image(raw)
    image.thumbnail((LONGEST_EDGE, LONGEST_EDGE))
    return image


def load_golden(path: Path, read: Read = Path.read_bytes, names: Sequence[str] = (ONE,)) -> Golden:
    """Read what `Golden.save` wrote; raises `UserError` when it is damaged.

    Args:
        path: The file.
        read: How it is read.
        names: The graph's outputs; a file of one output does not name it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(read(path))
        outputs = {name: tensors[key] for name, key in _keys(names).items()}
        count = len(next(iter(outputs.values())))
        for array in outputs.values():
            if array.ndim < 2 or not 1 <= len(array) == count <= MOST:
                raise ValueError(f"outputs of the shape {array.shape}")
        raws = tuple(_raw_from_arrays(index, tensors) for index in range(count))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
        raise UserError(f"{path} holds no golden vectors ({err}); export the run again.") from err
    arrays = {n.removeprefix("input."): t for n, t in tensors.items() if n.startswith("input.")}
    return Golden(raws, arrays, outputs)


def replay(
    golden: Golden, preprocess: Preprocess, runner: Forward, spread: Mapping[str, float]
) -> Replay:
    """Run golden inputs from raw to output and return how far off the result is.

    Args:
        golden: What is expected.
        preprocess: The bundle's preprocessing.
        runner: The bundle's graph on the device to be tested.
        spread: Standard deviation of each output, which its difference is scaled by.
    """
    arrays = preprocess(golden.raws)
    if arrays.keys() != golden.arrays.keys():
        return Replay(float("inf"), float("inf"))
    before = max(_largest_gap(arrays[name], array) for name, array in golden.arrays.items())
    found = runner(arrays)
    if found.keys() != golden.outputs.keys():
        return Replay(before, float("inf"))
    gaps = {name: _largest_gap(found[name], array) for name, array in golden.outputs.items()}
    return Replay(before, max(gap / spread[name] for name, gap in gaps.items()))


def _keys(names: Sequence[str]) -> dict[str, str]:
    """Return the name of each output's tensor in the file."""
    return {name: ONE if len(names) == 1 else f"{ONE}.{name}" for name in names}


def _largest_gap(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    gap = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    return gap if np.isfinite(gap) else float("inf")  # NaN would get lost among others


def _raw_to_arrays(index: int, raw: Raw) -> dict[str, NDArray[np.uint8]]:
    if isinstance(raw, str):
        return {f"raw.{index}.text": _bytes(raw)}
    if isinstance(raw, tuple):
        return {f"raw.{index}.first": _bytes(raw[0]), f"raw.{index}.second": _bytes(raw[1])}
    return {f"raw.{index}.rgb": np.asarray(open_image(raw), dtype=np.uint8)}


def _raw_from_arrays(index: int, tensors: dict[str, NDArray[Any]]) -> Raw:
    stem = f"raw.{index}."
    if stem + "text" in tensors:
        return _text(tensors[stem + "text"])
    if stem + "first" in tensors:
        return _text(tensors[stem + "first"]), _text(tensors[stem + "second"])
    pixels = tensors[stem + "rgb"]
    height, width, channels = pixels.shape
    fits = min(height, width) >= 1 and max(height, width) <= LONGEST_EDGE
    if pixels.dtype != np.uint8 or channels != 3 or not fits:
        raise ValueError(f"a picture of the shape {pixels.shape} and type {pixels.dtype}")
    return Image.fromarray(pixels)


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


def _text(array: NDArray[Any]) -> str:
    return array.tobytes().decode("utf-8")


def spread_evenly(raws: Sequence[Raw], count: int) -> list[Raw]:
    """Return `count` of the inputs, evenly spaced from first to last."""
    if len(raws) <= count:
        return list(raws)
    steps = np.linspace(0, len(raws) - 1, count).round().astype(int)
    return [raws[int(step)] for step in steps]
