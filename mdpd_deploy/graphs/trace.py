"""One torch module → one ONNX graph: what export and the benchmark both need.

The graph takes the backbone's inputs by name with a named `batch` axis (text: also `sequence`)
and gives the model's outputs by name, as `logits` or `scores`. It is opset 20 with eager attention,
holds only operators of the default domain and carries no stack trace, path or other note of the
machine that made it. How two graphs are compared is in `signature.py`.
"""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from onnxscript import ir

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.errors import ExportError
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
    _refuse_operator_names(model.output_names)
    program = _trace(model)
    external = weights > external_above_bytes
    program.save(str(path), external_data=external)
    proto = onnx.load(path, load_external_data=False)
    strip_notes(proto)
    axes = axes_of(model)
    _check_rules(proto, axes)
    _check_names(proto, model.output_names)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)
    return OnnxGraph(path, tuple(axes), model.output_names, len(proto.graph.node))


def axes_of(model: TaskModel) -> dict[str, dict[int, str]]:
    """Return the named axes of each input, e.g. `{"input_ids": {0: "batch", 1: "sequence"}}`."""
    text = model.backbone.takes == "text"
    axes = {0: "batch", 1: "sequence"} if text else {0: "batch"}
    return {name: axes for name in model.backbone.input_names}


def _refuse_operator_names(names: Sequence[str]) -> None:
    """Refuse outputs called like an operator, as runtimes may call values inside the graph."""
    operators = {schema.name.lower() for schema in onnx.defs.get_all_schemas()}
    for name in names:
        if not _WORD.fullmatch(name) or name in operators:
            raise ExportError(
                f"an output cannot be called {name!r}: use lowercase words that are not the name of "
                "an operator, e.g. image_vector."
            )


def _check_names(proto: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Every value of the graph has a name of its own, and the outputs have those asked for."""
    graph = proto.graph
    if [value.name for value in graph.output] != list(outputs):
        raise ExportError("the graph's outputs are not the model's, in order.")
    made = [name for node in graph.node for name in node.output if name]
    names = Counter([*made, *(v.name for v in graph.input), *(t.name for t in graph.initializer)])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ExportError(
            f"two values of the graph are called {twice[0]!r}: name outputs otherwise."
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
        _batch_norms_apart(),
        _distinct_norms(backbone) as values,
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
            )
        except Exception as err:  # the exporter wraps whatever a model's code can raise
            reason = str(err).strip().splitlines() or [type(err).__name__]
            raise ExportError(f"the model could not be traced to ONNX: {reason[0]}") from err
    assert program is not None
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


@contextlib.contextmanager
def _distinct_norms(backbone: Backbone) -> Iterator[dict[str, torch.Tensor]]:
    """Give norms values of their own while the model is traced; yield the true ones by name.

    The exporter makes one tensor of equal ones, and with it one name: two norms whose outputs are
    added learn the same shift.
    """
    norms = backbone.norms()
    values = {name: parameter.detach().clone() for name, parameter in norms.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in norms.values():
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        yield values
    finally:
        for name, parameter in norms.items():
            parameter.data.copy_(values[name])


@contextlib.contextmanager
def _batch_norms_apart() -> Iterator[None]:
    """Keep batch norms as nodes: folded into convolutions, tuned norms would lose their names.

    Runtimes fold them when they open the graph, so nothing is slower.
    """
    from onnxscript import rewriter
    from onnxscript.rewriter.rules import common

    folding = {
        id(getattr(common, name)) for name in dir(common) if name.startswith("fuse_batchnorm")
    }
    kept = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in folding)
    with patch.object(rewriter, "_DEFAULT_REWRITE_RULES", kept):
        yield


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
