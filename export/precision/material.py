"""What a conversion may look at besides the graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Calibration:
    """Inputs that ranges of activations are read from.

    Attributes:
        source: What they are, for the manifest, e.g. `128 training inputs`.
        batches: Named arrays, a batch each.
    """

    source: str
    batches: Sequence[Arrays]


@dataclass(frozen=True)
class Material:
    """Handed to every converter; each takes what it needs.

    Attributes:
        golden: The bundle's golden inputs.
        calibration: Reads a sample of the task's training inputs.
        autocast_python: Interpreter of the environment that holds ModelOpt.
        converted: A file that was already converted elsewhere; None = convert here.
    """

    golden: Calibration
    calibration: Callable[[], Calibration]
    autocast_python: Path | None = None
    converted: Path | None = None
