"""fp16 for ONNX Runtime on the CPU: half the file, no speed.

ONNX Runtime's own converter, which the runtime extra brings along. It leaves the nodes it adds at
the end of the list, so they are put in order; the file is checked like every converted one.
"""

from pathlib import Path

import onnx

from mdpd_deploy.export.precision.material import Material
from mdpd_deploy.export.precision.runtime_tools import float16_tools


def fp16_for_size(source: Path, target: Path, material: Material) -> str:
    """Write the float16 graph with float32 inputs and outputs; see `Form.convert`."""
    half = float16_tools().convert_float_to_float16(onnx.load(source), keep_io_types=True)
    _order(half.graph)
    onnx.save(half, target)
    return "ONNX Runtime's float16 converter"


def _order(graph: onnx.GraphProto) -> None:
    """Sort the nodes so that each comes after those whose values it reads."""
    known = {"", *(t.name for t in graph.initializer), *(value.name for value in graph.input)}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "a graph without cycles always has a node that can run"
        ordered.append(ready[0])
        known.update(ready[0].output)
        waiting.remove(ready[0])
    del graph.node[:]
    graph.node.extend(ordered)
