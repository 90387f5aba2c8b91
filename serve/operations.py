"""How much a variant computes, beside how long it takes: graph nodes, operators, FLOPs.

A side network adds far more small operators than arithmetic (2.2 times the kernels but 1.02 to
1.07 times the operations of a ViT-B), so a ratio of times is only understood beside both.
"""

from pathlib import Path
from typing import Any

import onnx
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mdpd_deploy.model import TaskModel
from mdpd_deploy.serve.latency.inputs import Arrays


def count_nodes(path: Path) -> int:
    """Return the number of operators in an ONNX graph."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def count_flops(model: TaskModel, arrays: Arrays) -> int:
    """Return the floating-point operations of one forward (a multiply-add counts as two).

    PyTorch's own counter on eager attention, so that every product is seen; it counts matrix
    products and convolutions, not element-wise work.
    """
    with FlopCounterMode(display=False) as counter:
        _forward(model, arrays, attention="eager")
    return int(counter.get_total_flops())


def count_operators(model: TaskModel, arrays: Arrays) -> int:
    """Return how many PyTorch operators one eager forward runs, views not counted.

    On a GPU this is close to the number of kernels launched.
    """
    counter = _OperatorCounter()
    with counter:
        _forward(model, arrays, attention="sdpa")
    return counter.count


def _forward(model: TaskModel, arrays: Arrays, *, attention: str) -> None:
    inputs = [torch.from_numpy(arrays[name]) for name in model.backbone.input_names]
    model.backbone.set_attention(attention, model)
    try:
        # Not inference_mode: the dispatch modes would see some composite operators undivided.
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.backbone.set_attention("sdpa", model)


class _OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
