"""What torch's exporter, its optimiser and ONNX Runtime do to a graph that we cannot take."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from onnxscript import ir, opset20, rewriter
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.rules import common

from mdpd_deploy.backbones.base import Backbone

ALMOST_ZERO = 2.0**-24  # the smallest number above 0 that fp16 has, too


def _squeeze(x: Any) -> Any:
    """Drop the axes of length 1, but not that of a batch which has one example when it runs."""
    operators: Any = opset20  # whose types know graphs only
    return operators.Squeeze(x, [axis for axis, length in enumerate(x.shape) if length == 1])


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.squeeze.default: _squeeze
}


@contextlib.contextmanager
def distinct_norms(backbone: Backbone) -> Iterator[dict[str, torch.Tensor]]:
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


def simplify(model: ir.Model, norms: Collection[str]) -> None:
    """Fold constants and fuse nodes in place, as the exporter would.

    Two things are left apart. What is computed from a norm alone (a reshaped scale, one plus a
    scale) would be folded and lose its name. Batch norms would be folded into convolutions, and with
    them the names of tuned norms; runtimes fold both when they open the graph, so nothing is slower.

    Args:
        model: As traced.
        norms: Names of the initializers that are tuned.
    """

    def may_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in norms for v in node.inputs) else None

    folding = {
        id(getattr(common, name)) for name in dir(common) if name.startswith("fuse_batchnorm")
    }
    kept = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in folding)
    with patch.object(rewriter, "_DEFAULT_REWRITE_RULES", kept):
        optimize_ir(model, should_fold=may_fold)
    _keep_zeros_around_max_pools(model)


def _keep_zeros_around_max_pools(model: ir.Model) -> None:
    """Pad with almost zero before a max pool.

    ONNX Runtime makes zeros the pool's own border, which is minus infinity: another maximum where
    all else is negative.
    """
    tensor = ir.tensor(np.float32(ALMOST_ZERO), name="almost_zero")
    border = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype))
    border.shape = ir.Shape(())
    for node in model.graph:
        after = {user.op_type for user in node.outputs[0].consumers()}
        if node.op_type != "Pad" or after != {"MaxPool"} or not _pads_zeros(node):
            continue
        old = node.inputs[2] if len(node.inputs) > 2 else None
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, border)
        if old is not None and not old.uses():
            model.graph.initializers.pop(str(old.name), None)
    if border.uses():
        model.graph.register_initializer(border)


def _pads_zeros(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return value is None or (value.const_value is not None and not value.const_value.numpy().any())
