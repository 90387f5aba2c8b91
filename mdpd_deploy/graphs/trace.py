"""One torch module → one ONNX graph: what export and the benchmark both need.

The graph takes the backbone's inputs by name with a named `batch` axis (text: also `sequence`)
and gives the model's outputs by name, as `logits` or `scores`. It is opset 20 with eager attention,
holds only operators of the default domain and carries no stack trace, path or other note of the
machine that made it. How two graphs are compared is in `signature.py`.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import ir

from mdpd_deploy.errors import ExportError
from mdpd_deploy.graphs.exporter import TRANSLATIONS, distinct_norms, simplify
from mdpd_deploy.model import TaskModel

OPSET = (
    20  # the exporter's default in torch 2.11 to 2.15; LayerNorm is one node, all runtimes read it
)
EXTERNAL_ABOVE_BYTES = 1_500_000_000  # protobuf cannot pass 2 GB; beyond this weights get a file
_WORD = re.compile(r"[a-z][a-z0-9_]*")
EXAMPLE_BATCH, EXAMPLE_TOKENS = 2, 7  # a batch of 1 or an even length can hide a fixed axis


@dataclass(frozen=True)
class OnnxGraph:
    """An exported graph.

    Attributes:
        path: The `.onnx` file; `path.name + ".data"` lies beside it when the weights are large.
        input_names: The graph's inputs in order.
        output_names: The graph's outputs in order, e.g. `logits`.
        nodes: How many operators it runs.
    """

    path: Path
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    nodes: int


def export_onnx(
    model: TaskModel, path: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES
) -> OnnxGraph:
    """Export a model on CPU in FP32 to `path`.

    Args:
        model: Deployed model, or the rival with its side network. It is left in eval mode with
            SDPA attention; its weights are not touched.
        path: Where the `.onnx` file goes; the folder must exist.
        external_above_bytes: Weights larger than this go to `<path>.data`.

    Raises:
        ExportError: If a weight is not FP32, the exporter fails, or the graph breaks a rule of
            this module.
    """
    weights = sum(_checked_bytes(name, tensor) for name, tensor in model.state_dict().items())
    axes = axes_of(model)
    _refuse_names(model.output_names, tuple(axes))
    program = _trace(model)
    external = weights > external_above_bytes
    program.save(str(path), external_data=external)
    proto = onnx.load(path, load_external_data=False)
    strip_notes(proto)
    _check_rules(proto, axes)
    if [value.name for value in proto.graph.output] != list(model.output_names):
        raise ExportError("the graph's outputs are not the model's, in order.")
    path.write_bytes(proto.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        first = str(err).strip().splitlines()[0]
        raise ExportError(f"torch.onnx wrote a graph that is none ({first}).") from err
    return OnnxGraph(path, tuple(axes), model.output_names, len(proto.graph.node))


def axes_of(model: TaskModel) -> dict[str, dict[int, str]]:
    """Return the named axes of each input, e.g. `{"input_ids": {0: "batch", 1: "sequence"}}`."""
    text = model.backbone.takes == "text"
    axes = {0: "batch", 1: "sequence"} if text else {0: "batch"}
    return {name: axes for name in model.backbone.input_names}


def _refuse_names(outputs: Sequence[str], inputs: Sequence[str]) -> None:
    """Refuse outputs called like an input, or an operator, as runtimes may call values inside."""
    operators = {schema.name.lower() for schema in onnx.defs.get_all_schemas()}
    for name in outputs:
        if name in inputs:
            raise ExportError(
                f"two values of the graph are called {name!r}: name outputs otherwise."
            )
        if not _WORD.fullmatch(name) or name in operators:
            raise ExportError(
                f"an output cannot be called {name!r}: use lowercase words that are not the name of "
                "an operator, e.g. image_vector."
            )


def _checked_bytes(name: str, tensor: torch.Tensor) -> int:
    if tensor.is_floating_point() and tensor.dtype != torch.float32:
        raise ExportError(f"{name} is {tensor.dtype}: only an FP32 model can be exported.")
    if tensor.device.type != "cpu":
        raise ExportError(
            f"{name} lies on {tensor.device}: move the model to the CPU to export it."
        )
    return tensor.nbytes


def _trace(model: TaskModel) -> Any:
    backbone = model.backbone
    text = backbone.takes == "text"
    example = backbone.example_inputs(EXAMPLE_BATCH, EXAMPLE_TOKENS if text else None)
    axes = axes_of(model)
    names = list(axes)
    model.eval()
    with (
        _eager_attention(model),
        distinct_norms(backbone) as values,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about axis names shared between inputs, which we want
        try:
            program = torch.onnx.export(
                model,
                tuple(example[name] for name in names),  # positional: keywords swap names silently
                dynamo=True,
                dynamic_shapes=(tuple(axes[name] for name in names),),
                input_names=names,
                output_names=list(model.output_names),
                opset_version=OPSET,
                verbose=False,
                optimize=False,
                custom_translation_table=TRANSLATIONS,
            )
            assert program is not None
            simplify(program.model, {f"backbone.{name}" for name in values})
        except Exception as err:  # the exporter wraps whatever a model's code can raise
            reason = str(err).strip().splitlines() or [type(err).__name__]
            raise ExportError(f"the model could not be traced to ONNX: {reason[0]}") from err
    for name, value in values.items():
        initializer = program.model.graph.initializers.get(f"backbone.{name}")
        if initializer is not None:
            initializer.const_value = ir.tensor(value.numpy(), name=initializer.name)
    return program


@contextlib.contextmanager
def _eager_attention(model: TaskModel) -> Iterator[None]:
    """Spell attention out: fused attention adds a third more nodes at this opset."""
    model.backbone.set_attention("eager", model)
    try:
        yield
    finally:
        model.backbone.set_attention("sdpa", model)


def strip_notes(proto: onnx.ModelProto) -> None:
    """Drop stack traces and source paths; the exporter leaves them on every node."""
    graph = proto.graph
    proto.doc_string = graph.doc_string = ""
    groups = (graph.node, graph.input, graph.output, graph.value_info, graph.initializer)
    del proto.metadata_props[:]
    del graph.metadata_props[:]
    for item in (item for group in groups for item in group):
        item.doc_string = ""
        del item.metadata_props[:]


def _check_rules(proto: onnx.ModelProto, axes: dict[str, dict[int, str]]) -> None:
    domains = {entry.domain for entry in proto.opset_import} | {n.domain for n in proto.graph.node}
    if domains != {""}:
        raise ExportError(
            f"the graph needs operators outside the ONNX standard: {sorted(domains)}."
        )
    if proto.functions or any(a.HasField("g") for n in proto.graph.node for a in n.attribute):
        raise ExportError("the graph holds functions or control flow, which are not expected here.")
    if any(node.op_type == "Dropout" for node in proto.graph.node):
        raise ExportError("the graph holds a Dropout node: a module was left in training mode.")
    for value in proto.graph.input:
        wanted = axes.get(value.name)
        dims = value.type.tensor_type.shape.dim
        named = {i: dim.dim_param for i, dim in enumerate(dims) if dim.dim_param}
        if wanted != named:
            raise ExportError(f"axes of input {value.name!r} became {named}, expected {wanted}.")
    if [value.name for value in proto.graph.input] != list(axes):
        raise ExportError("the graph's inputs are not the backbone's, in order.")
