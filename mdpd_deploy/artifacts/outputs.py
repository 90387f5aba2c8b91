"""RUN/outputs.safetensors: what a trained run answers on its evaluation data, beside the truth.

By name `SPLIT/labels`, `SPLIT/deployed` and, of MDPD, `SPLIT/side`. So two runs can be compared
example by example, and a new metric needs no model. No torch here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

OUTPUTS = "outputs.safetensors"
LARGEST = 2**26  # bytes of a split's outputs; larger ones are not kept


def write_outputs(run: Path, splits: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
    """Write labels [n] and outputs [n, C] by split and name; a split over `LARGEST` is left out."""
    arrays = {
        f"{split}/{name}": array
        for split, found in splits.items()
        if sum(array.nbytes for array in found.values()) <= LARGEST
        for name, array in found.items()
    }
    save_file(arrays, run / OUTPUTS)


def read_outputs(
    run: Path, split: str, model: str = "deployed"
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return a model's outputs on a split [n, C] and the labels [n]; None where they were not kept."""
    try:
        with safe_open(run / OUTPUTS, "numpy") as file:
            return file.get_tensor(f"{split}/{model}"), file.get_tensor(f"{split}/labels")
    except (OSError, SafetensorError):
        return None
