"""Fading: which model of a run is deployed, and what it is compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.model import Deployed, TaskModel


@dataclass(frozen=True, eq=False)
class Faded:
    """The model to export.

    Attributes:
        model: Backbone + head; more only for a method that keeps it.
        bare: The same head on the untouched backbone; None when nothing faded.
        changed: Names of the model's tensors whose values differ from `bare`'s.
    """

    model: TaskModel
    bare: Deployed | None
    changed: tuple[str, ...]

    @property
    def faded(self) -> bool:
        """Whether nothing is left beside backbone and head."""
        return self.bare is not None


def fade(run: Run) -> Faded:
    """Load what a run deploys, FP32 on the CPU.

    Raises:
        UserError: If the run is damaged or its backbone is not the one it was trained on.
    """
    deployed = run.load_deployed()
    if run.keeps:
        return Faded(deployed, None, ())
    bare = run.load_bare()
    return Faded(deployed, bare, tuple(_changed_names(deployed, bare)))


def bare_norms(faded: Faded) -> dict[str, Tensor] | None:
    """Return the untouched values of every tensor that fading changed, by graph name.

    None when they are not all norms: then a bundle cannot rebuild `bare` from a few vectors.
    """
    if faded.bare is None:
        return None
    norms = {f"backbone.{name}" for name in faded.bare.backbone.norms()}
    if not set(faded.changed) <= norms:
        return None
    state = faded.bare.state_dict()
    return {name: state[name] for name in faded.changed}


def make_comparable(faded: Faded) -> None:
    """Give `bare` varied values where it is constant and the deployed model is not.

    The exporter drops an all-zero bias; that is a matter of values, and the identity gate asks
    about structure.
    """
    assert faded.bare is not None
    deployed = faded.model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in faded.bare.state_dict().items():
        if name in faded.changed and _is_constant(tensor) and not _is_constant(deployed[name]):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _changed_names(deployed: nn.Module, bare: nn.Module) -> list[str]:
    before = bare.state_dict()
    return [n for n, tensor in deployed.state_dict().items() if not torch.equal(tensor, before[n])]


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())
