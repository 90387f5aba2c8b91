"""Which whole numbers a graph's inputs may hold, read from the tables that they index.

A token id beyond the embedding makes a CPU fail the whole batch, and a GPU read past the table.
"""

from pathlib import Path

from mdpd_deploy.files import Read


def read_value_ranges(path: Path, read: Read = Path.read_bytes) -> dict[str, tuple[int, int]]:
    """Return (0, rows - 1) for every graph input that picks rows of a stored table.

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
