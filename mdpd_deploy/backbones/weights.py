"""Weights files: read without running code, and loaded only where every tensor fits."""

from pathlib import Path

from torch import Tensor, nn

from mdpd_deploy.backbones.build import explaining, quiet_libraries
from mdpd_deploy.errors import UserError


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
            f"{option}: {path} must be a .safetensors, .bin, .pt or .pth file; convert it first."
        )
    mend = "Take the file from a sound copy; it must hold tensors only."
    with quiet_libraries(), explaining(f"{option}: {path} cannot be read", mend):
        state = load_state_dict(str(path), weights_only=True)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{option}: {path} holds no named tensors.")
    return state


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
