"""Graphs for many tasks on one backbone, made from a single-task graph. No torch here.

base graph    the bare backbone's graph with the norms and head declared as graph inputs with a
              default, so that a run may be fed another task's.
mixed graph   takes `task_id` [batch] besides. Every task is one row of one table [T, 1, R]; one
              Gather brings each sample's row, one Split cuts it into the norms' scales and shifts
              [B, 1, D] and the head's weight and bias.

Three forms of the norms compute the same:

explicit  LayerNormalization with a scale of ones, then Mul and Add: the fastest on CPUs, since ONNX
          Runtime normalises by its fast path. The ones have shape [1, D], which keeps it from fusing
          the norm with the residual Add before it; that fusion is the slower one there.
fused     each sample's scale and shift straight into LayerNormalization, whose ONNX definition
          lets them broadcast: six nodes more than the base graph, whatever its depth.
tensorrt  as explicit, the ones as [D]: TensorRT's normalisation takes one scale for the batch.

Batch norms take one scale and shift for the batch by definition: in every form they get ones and
zeros, and Mul and Add follow. Maps have four axes, with channels last (Swin, ConvNeXt) or first
(batch norms).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from mdpd_deploy.errors import ExportError
from mdpd_deploy.graphs.deltas import HEAD_BIAS, HEAD_WEIGHT, Tensors
from mdpd_deploy.runtimes.base import TASK_ID

Form = Literal["explicit", "fused", "tensorrt"]
OUTPUT = "outputs"  # logits of one task, scores of another
TABLE = "tasks.table"
TABLE_LIMIT_BYTES = 1_500_000_000  # the table lies in the graph's file, which cannot pass 2 GB
INLINE_BELOW_BYTES = 1024
PAGE_BYTES = 4096  # where each weight starts, so that it can be mapped into memory


def name_output(proto: onnx.ModelProto) -> None:
    """Call the one output `outputs`."""
    (output,) = proto.graph.output
    before, output.name = output.name, OUTPUT
    for node in proto.graph.node:
        for index, name in enumerate(node.output):
            if name == before:
                node.output[index] = OUTPUT


def declare_inputs(proto: onnx.ModelProto, names: Iterable[str]) -> None:
    """Let runs override initialisers; without a feed they keep the value in the file."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in names:
        shape = list(tensors[name].dims)
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def move_weights_out(proto: onnx.ModelProto, data: Path, keep: Iterable[str]) -> None:
    """Write the graph's weights to a file of their own; the graph then refers to it.

    Args:
        proto: The graph, its weights inside. Changed in place.
        data: The file to write; graphs in the same folder can share it.
        keep: Names of weights that stay in the graph.
    """
    kept = set(keep)
    with data.open("wb") as stream:
        for tensor in proto.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            if tensor.name in kept or len(raw) < INLINE_BELOW_BYTES:
                continue
            stream.seek(-stream.tell() % PAGE_BYTES, 1)
            tensor.raw_data = raw  # set_external_data wants it there
            external_data_helper.set_external_data(tensor, data.name, stream.tell(), len(raw))
            for field in ("raw_data", "float_data", "int64_data", "int32_data", "double_data"):
                tensor.ClearField(field)
            stream.write(raw)


def mixed_graph(
    base: onnx.ModelProto, tasks: Sequence[Tensors], *, form: Form = "explicit"
) -> onnx.ModelProto:
    """Build the mixed graph.

    Args:
        base: The base graph; its weights may lie outside. Not modified.
        tasks: Each task's tensors in the base graph's shapes, in the order of `task_id`.
        form: See the module.

    Returns:
        A graph whose output row i is what task `task_id[i]` answers to sample i. Columns beyond a
        task's own width are 0 and mean nothing.

    Raises:
        ExportError: If the graph uses a norm or the head in a way that is not expected, or the
            table of all tasks is too large.
    """
    mixed = onnx.ModelProto()
    mixed.CopyFrom(base)
    row = _Row(base, tasks)
    surgery = _Surgery(mixed.graph, row, form)
    nodes = [made for node in base.graph.node for made in surgery.replace(node)]
    graph = mixed.graph
    del graph.node[:]
    graph.node.extend([*surgery.before, *nodes])
    inputs = [value for value in graph.input if value.name not in row.names]
    del graph.input[:]
    graph.input.extend(
        [*inputs, helper.make_tensor_value_info(TASK_ID, TensorProto.INT64, ["batch"])]
    )
    used = {name for node in graph.node for name in node.input}
    weights = [t for t in (*graph.initializer, *surgery.constants.values()) if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    return mixed


def added_nodes(base: onnx.ModelProto, mixed: onnx.ModelProto) -> dict[str, int]:
    """Return the operators that a mixed graph has beyond its base, by type.

    Raises:
        ExportError: If a node of the base is missing or has other attributes, or reads anything
            else but its own values and what came from the table.
    """
    found = {node.name: node for node in mixed.graph.node}
    for node in base.graph.node:
        twin = found.get(node.name)
        if node.op_type == "Gemm" and HEAD_WEIGHT in node.input:
            continue  # one head for the batch becomes one per sample
        same = twin is not None and twin.op_type == node.op_type
        if not same or list(twin.attribute) != list(node.attribute):  # type: ignore[union-attr]
            raise ExportError(f"the mixed graph lost {node.op_type} {node.name!r} of the backbone.")
        assert twin is not None
        for own, other in zip(node.input, twin.input, strict=False):
            if own != other and not other.startswith("tasks."):
                raise ExportError(f"the mixed graph feeds {other!r} to {node.name!r}, not {own!r}.")
    before = Counter(node.op_type for node in base.graph.node)
    after = Counter(node.op_type for node in mixed.graph.node)
    after.subtract(before)
    return {kind: count for kind, count in sorted(after.items()) if count}


class _Row:
    """How the numbers of one task lie in a row of the table.

    Attributes:
        names: The tensors in order.
        shapes: Their shapes in the base graph.
        table: All tasks [T, 1, R]; a head's weight lies transposed, [D, C].
    """

    def __init__(self, base: onnx.ModelProto, tasks: Sequence[Tensors]) -> None:
        first = tasks[0]
        self.shapes = {name: value.shape for name, value in first.items()}
        self.names = tuple(first)
        known = {tensor.name: tuple(tensor.dims) for tensor in base.graph.initializer}
        for name, shape in self.shapes.items():
            if known.get(name) != shape:
                raise ExportError(f"the base graph has no weight {name} of shape {shape}.")
        size = sum(value.nbytes for value in first.values())
        if size * len(tasks) > TABLE_LIMIT_BYTES:
            raise ExportError(
                f"the norms and heads of {len(tasks)} tasks need {size * len(tasks) / 1e9:.1f} GB "
                f"in one graph, at most {TABLE_LIMIT_BYTES / 1e9} GB fit: export fewer tasks "
                "together (a wide head widens every task's)."
            )
        rows = [np.concatenate([_flat(name, task[name]) for name in self.names]) for task in tasks]
        self.table: NDArray[np.float32] = np.stack(rows)[:, None, :]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each tensor."""
        return [int(np.prod(self.shapes[name])) for name in self.names]


def _flat(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    return (value.T if name == HEAD_WEIGHT else value).ravel()


class _Surgery:
    """Rewires the nodes that read a task's tensor."""

    def __init__(self, graph: onnx.GraphProto, row: _Row, form: Form) -> None:
        self.row = row
        self.form = form
        self.constants: dict[str, TensorProto] = {}
        self._ranks = _ranks(graph)
        self.before = [
            helper.make_node("Gather", [self._constant(TABLE, row.table), TASK_ID], ["tasks.row"],
                             name="tasks.gather", axis=0),
            helper.make_node("Split", ["tasks.row", self._constant("tasks.sizes", row.sizes)],
                             [_piece(name) for name in row.names], name="tasks.split", axis=2),
        ]  # fmt: skip

    def replace(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return what takes the place of a node: itself, where it reads no task's tensor."""
        mine = [name for name in node.input if name in self.row.shapes]
        if not mine:
            return [node]
        if node.op_type == "LayerNormalization" and node.input[0] not in mine:
            return self._norm(node) if self.form == "fused" else self._explicit_norm(node)
        if node.op_type == "BatchNormalization" and not {*mine} & {node.input[0], *node.input[3:]}:
            return self._batch_norm(node)
        if node.op_type == "Gemm" and list(node.input[1:]) == [HEAD_WEIGHT, HEAD_BIAS]:
            return self._head(node)
        raise ExportError(
            f"--multi: {mine[0]} is read by {node.op_type}, and in one graph for several tasks only "
            "layer norms, batch norms and the head can take a value per sample: export each run alone."
        )

    def _norm(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        made: list[onnx.NodeProto] = []
        twin = _copy(node)
        for index, name in enumerate(node.input):
            if name in self.row.shapes:
                twin.input[index] = self._shaped(name, self._ranks[node.input[0]], made)
        return [*made, twin]

    def _explicit_norm(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        made: list[onnx.NodeProto] = []
        rank = self._ranks[node.input[0]]
        scale, *shift = [name for name in node.input[1:] if name]
        steps: list[tuple[str, str]] = []
        twin = _copy(node)
        del twin.input[1:]
        twin.input.append(scale)
        if scale in self.row.shapes:
            (width,) = self.row.shapes[scale]
            shape = (width,) if self.form == "tensorrt" else (1, width)
            ones = np.ones(shape, dtype=np.float32)
            twin.input[1] = self._constant(f"tasks.ones.{width}", ones)
            steps.append(("Mul", self._shaped(scale, rank, made)))
        for name in shift:
            known = name in self.row.shapes
            steps.append(("Add", self._shaped(name, rank, made) if known else name))
        made.append(twin)
        return self._followed(made, steps)

    def _batch_norm(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        made: list[onnx.NodeProto] = []
        twin, steps = _copy(node), []
        for index, (kind, value) in enumerate((("Mul", 1.0), ("Add", 0.0)), start=1):
            name = node.input[index]
            if name in self.row.shapes:
                (width,) = self.row.shapes[name]
                plain = np.full(width, value, dtype=np.float32)
                twin.input[index] = self._constant(f"tasks.{value:.0f}s.{width}", plain)
                steps.append(
                    (kind, self._shaped(name, self._ranks[node.input[0]], made, first=True))
                )
        return self._followed([*made, twin], steps)

    @staticmethod
    def _followed(
        made: list[onnx.NodeProto], steps: Sequence[tuple[str, str]]
    ) -> list[onnx.NodeProto]:
        """Let steps (operator, operand) follow the last node; the last one gives its output."""
        out = made[-1].output[0]
        for kind, operand in steps:
            before = made[-1].output[0] = f"tasks.before{kind}.{out}"
            name = f"tasks.{kind}.{out}"
            made.append(helper.make_node(kind, [before, operand], [out], name=name))
        return made

    def _head(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        plain = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        usual = {"transB": 1, "transA": 0, "alpha": 1.0, "beta": 1.0}
        if {**usual, **plain} != usual or plain.get("transB") != 1:
            raise ExportError("the head's Gemm is not x Wᵀ + b.")
        classes, width = self.row.shapes[HEAD_WEIGHT]
        shape = self._constant("tasks.head.shape", [-1, width, classes])
        axis = self._constant("tasks.axis", [1])
        make, weight = helper.make_node, _piece(HEAD_WEIGHT)
        return [
            make("Reshape", [weight, shape], ["tasks.head"], name="tasks.head.reshape"),
            make("Unsqueeze", [node.input[0], axis], ["tasks.pooled"], name="tasks.head.pooled"),
            make("MatMul", ["tasks.pooled", "tasks.head"], ["tasks.raw"], name="tasks.head.matmul"),
            make("Add", ["tasks.raw", _piece(HEAD_BIAS)], ["tasks.answer"], name="tasks.head.bias"),
            make("Squeeze", ["tasks.answer", axis], [node.output[0]], name="tasks.head.squeeze"),
        ]

    def _shaped(
        self, name: str, rank: int, made: list[onnx.NodeProto], *, first: bool = False
    ) -> str:
        """Return the piece [B, 1, D] as it broadcasts against a value of `rank` axes.

        Args:
            name: The norm's tensor.
            rank: 2, 3, or 4 for a map.
            made: What is needed for it is appended.
            first: The value's second axis is D, not its last.
        """
        piece = _piece(name)
        if rank == 3 and not first:
            return piece
        if rank not in (2, 3, 4):
            raise ExportError(
                f"the norm of {name} reads a value of {rank} axes; 2 to 4 can be mixed."
            )
        flat = f"{piece}.flat"
        if rank == 2:
            inputs = [piece, self._constant("tasks.axis", [1])]
            made.append(helper.make_node("Squeeze", inputs, [flat], name=flat))
            return flat
        (width,) = self.row.shapes[name]
        ones = [1] * (rank - 2)
        shape = [-1, width, *ones] if first else [-1, *ones, width]
        inputs = [piece, self._constant(f"tasks.shape.{'.'.join(map(str, shape[1:]))}", shape)]
        made.append(helper.make_node("Reshape", inputs, [flat], name=flat))
        return flat

    def _constant(self, name: str, value: NDArray[np.float32] | Sequence[int]) -> str:
        array = value if isinstance(value, np.ndarray) else np.array(value, dtype=np.int64)
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name


def _piece(name: str) -> str:
    return f"tasks.{name}"


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    return twin


def _ranks(graph: onnx.GraphProto) -> Mapping[str, int]:
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}
