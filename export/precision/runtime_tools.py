"""ONNX Runtime's converters, quiet: they log and warn for graph authors."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from mdpd_deploy.errors import missing_extra


def quantization() -> Any:
    """Return `onnxruntime.quantization`.

    Raises:
        UserError: If ONNX Runtime is not installed.
    """
    try:
        import onnxruntime.quantization as tools
    except ImportError as err:
        raise missing_extra("onnxruntime", "onnx", "converting a graph") from err
    return tools


def float16_tools() -> Any:
    """Return ONNX Runtime's float16 converter; raises `UserError` if it is not installed."""
    try:
        import onnxruntime.transformers.float16 as tools
    except ImportError as err:
        raise missing_extra("onnxruntime", "onnx", "converting a graph") from err
    return tools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the converters log on the root logger, and their warnings."""
    before = logging.root.manager.disable
    silent = logging.NullHandler()  # without a handler, logging would install one for good
    logging.root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(silent)
