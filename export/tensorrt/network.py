"""The exported graph as a TensorRT network: strongly typed, refused operators named once each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mdpd_deploy.errors import ExportError
from mdpd_deploy.runtimes.tensorrt.library import said

MOST_CAUSES = 4


def parse_graph(trt: Any, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    """Return the network of an ONNX file, and its parser, which holds the weights until the build.

    Args:
        trt: From `import_trt`.
        builder: A `trt.Builder`.
        logger: From `recording_logger`.
        graph: Given to the parser by its path, so that external weights are found.

    Raises:
        ExportError: If the parser refuses it, with the causes grouped by operator.
    """
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # 11 knows nothing else
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        causes = list(grouped_errors(parser))
        shown = "; ".join(causes[:MOST_CAUSES]) or said(logger.errors)
        more = f"; and {len(causes) - MOST_CAUSES} more" if len(causes) > MOST_CAUSES else ""
        raise ExportError(f"TensorRT's parser refuses the graph: {shown}{more}.")
    return network, parser


def grouped_errors(parser: Any) -> Iterator[str]:
    """Yield one phrase per operator and code: a refused graph repeats few causes at many nodes."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        groups.setdefault((error.node_operator(), error.code().name), []).append(error)
    for (operator, code), errors in groups.items():
        first = errors[0]
        where = f" at {first.node_name()}" if first.node_name() else ""
        inside = first.local_function_stack()
        via = f" in {' > '.join(inside)}" if inside else ""
        reason = " ".join(first.desc().split()).rstrip(".")
        count = f"{len(errors)} x " if len(errors) > 1 else ""
        yield f"{count}{operator or 'the graph'}{where}{via}: {reason} ({code})"


def mark_refittable(network: Any, logger: Any, names: Sequence[str]) -> None:
    """Let these weights be exchanged in the built engine.

    Raises:
        ExportError: If TensorRT does not know one of them by its ONNX name.
    """
    for name in names:
        if not network.mark_weights_refittable(name):
            raise ExportError(f"--refit: TensorRT cannot mark {name}: {said(logger.errors)}.")
