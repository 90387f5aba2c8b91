"""The base graph of a bundle of several tasks, and a task's delta to it.

The base graph is the bare backbone's with a head as wide as the widest task's. It is traced with
varied norms: the exporter merges equal weights and drops shifts that are zero, and a task
must find every norm under its name.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from mdpd_deploy.artifacts.manifest import BASE_FILE, EXTERNAL_FILE, weights_note
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.files import sha256_file
from mdpd_deploy.graphs.deltas import HEAD_BIAS, HEAD_WEIGHT, Delta, Tensors
from mdpd_deploy.graphs.mixed import declare_inputs, move_weights_out, name_output
from mdpd_deploy.graphs.trace import OnnxGraph, export_onnx
from mdpd_deploy.model import Deployed, TaskModel
from mdpd_deploy.tasks.head import Head


@dataclass(frozen=True)
class BaseGraph:
    """The base graph as written, and the weights that tasks may change in it.

    Attributes:
        traced: The graph as the exporter wrote it, norms varied: the structure to compare with.
        path: `base.onnx` in the bundle.
        sha256: Of that file.
        shapes: Weight name → shape, of every weight that a task may change.
    """

    traced: OnnxGraph
    path: Path
    sha256: str
    shapes: dict[str, tuple[int, ...]]


def export_base(backbone: Backbone, width: int, folder: Path, scratch: Path) -> BaseGraph:
    """Write `base.onnx` and the backbone's weights into a bundle.

    Raises:
        ExportError: If the backbone cannot be traced.
        VerificationError: If the graph lost the name of a norm.
    """
    model = comparable(Deployed(backbone, Head(backbone.width, width)), width)
    traced = export_onnx(model, scratch / "base.onnx")
    values = norm_tensors(backbone)
    values[HEAD_WEIGHT] = np.zeros((width, backbone.width), dtype=np.float32)
    values[HEAD_BIAS] = np.zeros(width, dtype=np.float32)
    proto = onnx.load(traced.path)
    lost = set(values) - {tensor.name for tensor in proto.graph.initializer}
    if lost:
        raise VerificationError(f"identity: the graph lost the name of {min(lost)}.")
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    move_weights_out(proto, folder / EXTERNAL_FILE, keep=values)
    declare_inputs(proto, values)
    name_output(proto)
    onnx.helper.set_model_props(proto, weights_note(sha256_file(folder / EXTERNAL_FILE)))
    path = folder / BASE_FILE
    path.write_bytes(proto.SerializeToString(deterministic=True))
    shapes = {name: value.shape for name, value in values.items()}
    return BaseGraph(traced, path, sha256_file(path), shapes)


def comparable(model: TaskModel, width: int) -> TaskModel:
    """Return a copy of a model with varied norms and a varied head of `width` outputs."""
    twin = copy.deepcopy(model)
    twin.head = Head(twin.backbone.width, width)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*twin.backbone.norms().values(), *twin.head.parameters()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return twin.eval()


def delta_of(model: TaskModel, base_sha256: str) -> Delta:
    """Return a model's norms and head; the un-scaling of scores is folded into the head."""
    head = model.head
    weight, bias = head.linear.weight.detach().double(), head.linear.bias.detach().double()
    if head.scaled:
        weight, bias = weight * head.label_std, bias * head.label_std + head.label_mean
    tensors = norm_tensors(model.backbone)
    tensors[HEAD_WEIGHT] = weight.float().numpy()
    tensors[HEAD_BIAS] = bias.float().numpy()
    return Delta(base_sha256, tensors)


def norm_tensors(backbone: Backbone) -> Tensors:
    """Return a copy of every tuned norm under the name that graphs give it."""
    return {
        f"backbone.{name}": np.array(tensor.detach().numpy())
        for name, tensor in backbone.norms().items()
    }
