"""What each input of a graph accepts: name, datatype, shape and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.files import Read
from mdpd_deploy.serve.core.refusal import invalid, shown

Arrays = dict[str, NDArray[Any]]

# Datatypes of the protocol → numpy, little-endian. BYTES has no fixed size, BF16 no numpy type.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_OF_NUMPY = {dtype.newbyteorder("="): name for name, dtype in DATATYPES.items()}


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's word for a numpy type."""
    return _OF_NUMPY[dtype.newbyteorder("=")]


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor.

    Attributes:
        name: As in the manifest; None for a fixed axis.
        low: Smallest size.
        high: Largest size; equal to `low` for a fixed axis.
    """

    name: str | None
    low: int
    high: int


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph, the batch axis first.

    Attributes:
        values: Whole numbers that may occur, as (smallest, largest); None = any finite value.
    """

    name: str
    datatype: str
    axes: tuple[Axis, ...]
    values: tuple[int, int] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type, little-endian."""
        return DATATYPES[self.datatype]

    @property
    def shape(self) -> list[int]:
        """As the protocol writes it: -1 for an axis that may vary."""
        return [-1 if axis.name else axis.low for axis in self.axes]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise a 400 unless every axis is within its range; nothing is allocated for this."""
        if len(shape) != len(self.axes):
            raise invalid(
                f"input {self.name!r} has {len(self.axes)} dimensions {self.shape}: "
                f"the request gives it {len(shape)}."
            )
        for number, (axis, size) in enumerate(zip(self.axes, shape, strict=True)):
            if not axis.low <= size <= axis.high:
                wanted = str(axis.low) if axis.low == axis.high else f"{axis.low} to {axis.high}"
                called = f" ({axis.name})" if axis.name else ""
                raise invalid(
                    f"input {self.name!r}: dimension {number}{called} must be {wanted}, "
                    f"not {shown(size)}."
                )

    def check_values(self, array: NDArray[Any]) -> None:
        """Raise a 400 for a value that the graph has no row for, or that is not finite."""
        if self.values is not None:
            low, high = self.values
            worst = int(array.min()), int(array.max())
            if worst[0] < low or worst[1] > high:
                bad = worst[0] if worst[0] < low else worst[1]
                raise invalid(f"input {self.name!r}: {bad} is not one of {low} to {high}.")
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            raise invalid(f"input {self.name!r} holds values that are not finite.")


def read_specs(
    ports: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, Mapping[str, int]],
    values: Mapping[str, tuple[int, int]],
) -> tuple[TensorSpec, ...]:
    """Return the specs of a manifest's inputs or outputs.

    Args:
        ports: `inputs` or `outputs` of the graph's entry.
        shapes: Its `shapes`: the range of every named axis.
        values: Ranges of values by input name, where known.
    """
    return tuple(
        TensorSpec(
            name=port["name"],
            datatype=datatype_of(np.dtype(port["dtype"])),
            axes=tuple(_axis(size, shapes) for size in port["shape"]),
            values=values.get(port["name"]),
        )
        for port in ports
    )


def _axis(size: str | int, shapes: Mapping[str, Mapping[str, int]]) -> Axis:
    if isinstance(size, int):
        return Axis(None, size, size)
    return Axis(size, shapes[size]["min"], shapes[size]["max"])


def read_value_ranges(path: Path, read: Read = Path.read_bytes) -> dict[str, tuple[int, int]]:
    """Return (0, rows - 1) for every graph input that picks rows of a stored table.

    A token id beyond the embedding makes a CPU fail the whole batch, and a GPU read past the table.

    Args:
        path: The `.onnx` file; weights outside it are not read.
        read: How the file is read.
    """
    import onnx

    graph = onnx.load_model_from_string(read(path)).graph
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    inputs = {item.name for item in graph.input}
    found: dict[str, tuple[int, int]] = {}
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in rows or node.input[1] not in inputs:
            continue
        if any(attribute.name == "axis" and attribute.i for attribute in node.attribute):
            continue
        name, count = node.input[1], rows[node.input[0]]
        found[name] = (0, min(count - 1, found.get(name, (0, count - 1))[1]))
    if "attention_mask" in inputs:
        found["attention_mask"] = (0, 1)
    return found
