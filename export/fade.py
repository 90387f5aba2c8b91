"""Fading: which model of a run is deployed, and the proof that nothing but backbone and head is."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.checks import identity, side_free
from mdpd_deploy.checks.subject import DEPLOYS_MORE, Seen
from mdpd_deploy.graphs.signature import value_digest
from mdpd_deploy.graphs.trace import OnnxGraph, export_onnx
from mdpd_deploy.model import Deployed, TaskModel
from mdpd_deploy.sides.base import SideNetwork


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


def prove_side_free(faded: Faded, graph: OnnxGraph) -> Seen:
    """Prove that no side network is in the module or, by name or count of numbers, in the graph."""
    if not faded.faded:
        return DEPLOYS_MORE
    inside = [n for n, module in faded.model.named_modules() if isinstance(module, SideNetwork)]
    own = (*faded.model.parameters(), *faded.model.buffers())  # masks of windows too
    numbers = sum(tensor.numel() for tensor in own)
    return side_free.prove(graph.path, numbers, inside)


def prove_identity(faded: Faded, graph: OnnxGraph) -> Seen:
    """Prove that the graph is the bare backbone's, traced here, but for the values that changed."""
    if faded.bare is None:
        return DEPLOYS_MORE
    norms = bare_norms(faded)
    kept = None if norms is None else {n: value_digest(t.numpy()) for n, t in norms.items()}
    ranks = {name: tensor.dim() for name, tensor in faded.model.state_dict().items()}
    vectors_only = all(ranks[name] <= 1 for name in faded.changed)
    make_comparable(faded)
    with tempfile.TemporaryDirectory(prefix="mdpd-bare-") as folder:
        bare = export_onnx(faded.bare, Path(folder, "bare.onnx"))
        return identity.prove(graph.path, bare.path, kept, faded.changed if vectors_only else None)


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
