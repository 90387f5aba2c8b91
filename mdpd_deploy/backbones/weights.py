"""Weights files: read without running code, and loaded only where every tensor fits."""

import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
from torch import Tensor, nn

from mdpd_deploy.backbones.build import explaining, quiet_libraries
from mdpd_deploy.errors import UserError

STACKED = "encoderblock/LayerNorm_0/scale"  # of all blocks in one array


def read_state(path: Path, option: str) -> dict[str, Tensor]:
    """Read a weights file: safetensors, or a PyTorch file without executing any code.

    Raises:
        UserError: If it is missing, damaged, of another kind, or holds more than tensors.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise UserError(f"{option}: the weights file {path} does not exist.")
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise UserError(
            f"{option}: {path} must be a .safetensors, .bin, .pt or .pth file, or for a vision "
            "transformer of timm the .npz of its authors; convert it first."
        )
    mend = "Take the file from a sound copy; it must hold tensors only."
    with quiet_libraries(), explaining(f"{option}: {path} cannot be read", mend):
        state = load_state_dict(str(path), weights_only=True)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{option}: {path} holds no named tensors.")
    return state


def load_arrays(model: nn.Module, path: Path, name: str) -> None:
    """Fill a model of timm from an `.npz` file as JAX's authors publish it, by timm's own loader.

    Nothing is unpickled. A classifier in the file is passed over.

    Args:
        model: Without values.
        path: The file.
        name: Of the backbone, for messages.

    Raises:
        UserError: If it is missing, damaged, or of another model.
    """
    loader: Any = model
    if not hasattr(model, "load_pretrained"):
        raise UserError(f"backbone.weights: timm reads no .npz for {name}: give .safetensors.")
    if not path.is_file():
        raise UserError(f"backbone.weights: the weights file {path} does not exist.")
    if not is_zipfile(path):
        raise UserError(f"backbone.weights: {path} is damaged: take it from a sound copy.")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what the loader passes over is found by it
    does_not_fit, mend = (
        f"{path} does not fit {name}",
        "Check that name and weights belong together.",
    )
    with quiet_libraries(), explaining(does_not_fit, mend):
        loader.load_pretrained(str(path))
        depth = _depth_of(path)
    absent = [name for name, p in model.named_parameters() if p.isnan().any()]
    if absent:
        raise UserError(f"{does_not_fit}: it has no values for {absent[0]}. {mend}")
    if depth > len(getattr(model, "blocks", range(depth))):
        raise UserError(f"{does_not_fit}: it is of {depth} blocks. {mend}")


def _depth_of(path: Path) -> int:
    """Return the number of blocks of an `.npz` file: numbered, or all in each array."""
    with np.load(path, allow_pickle=False) as arrays:
        numbered = [int(n) + 1 for key in arrays for n in re.findall(r"encoderblock_(\d+)/", key)]
        stacked = [len(arrays[key]) for key in arrays if key.endswith(STACKED)]
    return max([*numbered, *stacked], default=0)


def load_exactly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Fill a module whose every parameter and buffer must be in `state`, and nothing else.

    Raises:
        UserError: Naming the first tensors that are missing, left over, or of another shape.
    """
    expected = module.state_dict()
    problems = {
        "misses": [name for name in expected if name not in state],
        "has unknown": [name for name in state if name not in expected],
        "has another shape of": [
            name for name in expected if name in state and state[name].shape != expected[name].shape
        ],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{where} does not fit this architecture: it {problem} "
                f"{', '.join(names[:3])}{more}. Check that name, weights and sizes belong together."
            )
    module.load_state_dict(state)
