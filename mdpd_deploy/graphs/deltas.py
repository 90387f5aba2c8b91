"""A task's delta: the norms and the head that a task adds to a backbone, by their ONNX names.

safetensors with the graph's initialiser names. Its notes hold the SHA-256 of the base graph, and
that graph's notes the SHA-256 of the weights beside it, so a delta fits one backbone only. The
un-scaling of a regression task is folded into its head. No torch here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.errors import UserError
from mdpd_deploy.files import Read

HEAD_WEIGHT, HEAD_BIAS = "head.linear.weight", "head.linear.bias"
FORMAT = "mdpd-delta-1"
_MEND = "take a sound copy or export the run again"

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Delta:
    """What turns the base graph into one task's model.

    Attributes:
        base_sha256: SHA-256 of the base graph's file.
        tensors: Initialiser name → value: norm vectors [D], head weight [C, D] and bias [C].
    """

    base_sha256: str
    tensors: Tensors

    @property
    def width(self) -> int:
        """C, the task's own number of outputs."""
        return len(self.tensors[HEAD_BIAS])

    def save(self, path: Path) -> None:
        """Write a safetensors file; equal deltas give equal bytes."""
        from safetensors.numpy import save

        notes = {"format": FORMAT, "base_sha256": self.base_sha256}
        path.write_bytes(save(dict(sorted(self.tensors.items())), notes))

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
        """Return the tensors in the base graph's shapes: a narrower head gets rows of zeros.

        Args:
            shapes: Initialiser name → shape, of every tensor that tasks may change.

        Raises:
            UserError: If a tensor is missing, strange, or does not fit.
        """
        strange = sorted(set(self.tensors) ^ set(shapes))
        if strange:
            state = "lacks" if strange[0] in shapes else "has no place for"
            where = "the delta" if strange[0] in shapes else "the base graph"
            raise UserError(f"{where} {state} {strange[0]}: {_MEND}.")
        return {name: _padded(name, self.tensors[name], shape) for name, shape in shapes.items()}


def load_delta(path: Path, base_sha256: str, read: Read = Path.read_bytes) -> Delta:
    """Read what `Delta.save` wrote.

    Raises:
        UserError: If the file is damaged, no delta, or of another base graph; one sentence.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        raw = read(path)
        tensors: dict[str, NDArray[Any]] = dict(sorted(load(raw).items()))
        notes = _notes(raw)
    except (OSError, SafetensorError, TypeError, ValueError) as err:
        raise UserError(f"the delta {path} cannot be read ({err}): {_MEND}.") from err
    if notes.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a task delta ({FORMAT}): name one of `mdpd export --multi`."
        )
    if notes.get("base_sha256") != base_sha256:
        raise UserError(
            f"the delta {path} belongs to another base graph (SHA-256 "
            f"{notes.get('base_sha256', '')[:12]}… instead of {base_sha256[:12]}…): "
            "use it with the bundle it was exported in."
        )
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise UserError(f"the delta {path}: {name} is not finite float32; {_MEND}.")
    dimensions = {name: tensors[name].ndim for name in (HEAD_WEIGHT, HEAD_BIAS) if name in tensors}
    if dimensions != {HEAD_WEIGHT: 2, HEAD_BIAS: 1}:
        raise UserError(f"the delta {path} has no head ({HEAD_WEIGHT}, {HEAD_BIAS}): {_MEND}.")
    return Delta(base_sha256, tensors)


def _notes(raw: bytes) -> dict[str, str]:
    """Return the notes in a sound safetensors file, which the library reads from a path only."""
    size = int.from_bytes(raw[:8], "little")
    notes: dict[str, str] = json.loads(raw[8 : 8 + size]).get("__metadata__", {})
    return notes


def _padded(name: str, value: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if value.shape == shape:
        return value
    head = name in (HEAD_WEIGHT, HEAD_BIAS)
    if not head or value.ndim != len(shape) or value.shape[1:] != shape[1:]:
        raise UserError(f"the delta's {name} has shape {value.shape}, not {shape}: {_MEND}.")
    if len(value) > shape[0]:
        raise UserError(
            f"the delta answers {len(value)} outputs and the base graph has {shape[0]}: {_MEND}."
        )
    padded = np.zeros(shape, dtype=np.float32)
    padded[: len(value)] = value
    return padded
