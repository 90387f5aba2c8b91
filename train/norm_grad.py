"""How the backbone's norms get their gradient: one forward, one backward, six ways.

The forward runs before the side network and gives it its taps; the backward runs after the side
network's graph is freed. `recompute` is exact at the memory of one block:

    recompute  the graph holds the input of each block only; the backward pass runs a block again
               when its gradient has come down to it
    recompute-halves
               the same gradient; when a block runs again, its attention keeps its input only, and
               runs a third time when its own gradient is due: least memory
    full       the same gradient from a graph that keeps everything: fastest, most memory
    late:K     recompute, but only through the last K blocks; the norms below stay as they are
    local      each block's norms take the gradient of that layer's own feature loss; a last block
               without a side feature takes the logits loss. No gradient passes between blocks, and
               earlier blocks without a side feature are not trained.
    none       only the head is trained

Recomputed blocks replay their dropout. Where nothing below a block is trained, autograd keeps
nothing of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.backbones.wrap import (
    Run,
    Trace,
    apart,
    halves_of,
    plainly,
    recomputed,
    recomputed_halves,
)
from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError

TopLoss = Callable[[Tensor], Tensor]  # b_L → the backbone pass's loss: final norm, pooling, head
LayerLoss = Callable[[int, Tensor], Tensor]  # (1-based layer, b_l) → scalar


class NormGradient(ABC):
    """One of the ways; `trained` names the norm parameters that it moves.

    Args:
        backbone: Whose norms they are.
        run: How the forward runs a block.
    """

    def __init__(self, backbone: Backbone, run: Run) -> None:
        self.backbone = backbone
        self.run = run

    @abstractmethod
    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        """Return the norm parameters this mode trains, by full name."""

    def forward(self, inputs: Inputs) -> Trace:
        """Run the backbone and keep what the backward needs."""
        return self.backbone.trace(inputs, run=self.run)

    def backward(self, trace: Trace, top_loss: TopLoss, layer_loss: LayerLoss | None) -> None:
        """Accumulate gradients into the trained norms and into whatever `top_loss` trains.

        Args:
            trace: From `forward`; used up.
            top_loss: b_L → the backbone pass's loss (final norm, pooling and head inside).
            layer_loss: The feature loss of one layer against the detached side, for `local`.
        """
        top = trace.ends[-1]
        trace.drop()
        top_loss(top).backward()


class Recompute(NormGradient):
    """Exact, with the activations of one block at a time; stops above the first trained block."""

    def __init__(self, backbone: Backbone, run: Run = recomputed, first: int = 0) -> None:
        super().__init__(backbone, run)
        self.first = first

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for index in range(self.first, self.backbone.depth):
            found.update(self.backbone.block_norms(index))
        return found | self.backbone.final_norm_parameters()


class Full(NormGradient):
    """Exact, keeping every activation."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        return self.backbone.norms()


class Local(NormGradient):
    """Each block's norms follow their own layer's feature loss."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for layer in sorted({*feature_layers, self.backbone.depth}):
            found.update(self.backbone.block_norms(layer - 1))
        return found | self.backbone.final_norm_parameters()

    def backward(self, trace: Trace, top_loss: TopLoss, layer_loss: LayerLoss | None) -> None:
        if layer_loss is None:
            raise UserError(
                "train.norm_grad=local needs the feature losses of --method mdpd; "
                "use recompute, full or late:K."
            )
        ends = trace.ends[:]
        trace.drop()
        depth = self.backbone.depth
        top = ends[-1].detach().requires_grad_()
        top_loss(top).backward()
        for layer in range(depth, 0, -1):
            output = ends.pop()
            loss = layer_loss(layer, output)
            if loss.requires_grad:
                loss.backward()
            elif layer == depth:
                torch.autograd.backward(output, top.grad)


class Nothing(NormGradient):
    """No norm is trained; the loss reaches the head only."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        return {}


def build_norm_gradient(mode: str, backbone: Backbone) -> NormGradient:
    """Return the engine for `train.norm_grad`."""
    if mode.startswith("late:"):
        blocks = int(mode.removeprefix("late:"))
        if blocks > backbone.depth:
            raise UserError(
                f"train.norm_grad={mode}: the backbone has {backbone.depth} blocks; "
                f"use late:K with K from 1 to {backbone.depth}."
            )
        return Recompute(backbone, first=backbone.depth - blocks)
    if mode == "recompute-halves":
        return Recompute(backbone, recomputed_halves(_halves(backbone)))
    modes: dict[str, NormGradient] = {
        "recompute": Recompute(backbone),
        "full": Full(backbone, plainly),
        "local": Local(backbone, apart),
        "none": Nothing(backbone, plainly),
    }
    return modes[mode]


class NoHalvesError(UserError):
    """A backbone whose blocks have no halves."""


def _halves(backbone: Backbone) -> list[list[nn.Module]]:
    halves = [halves_of(block) for block in backbone.blocks()]
    if not any(len(parts) > 1 for parts in halves):
        raise NoHalvesError(
            "train.norm_grad=recompute-halves: no block of the backbone has two parts with maps of "
            "their own, such as attention and MLP; use recompute."
        )
    return halves


def exact_ways(config: Config) -> list[Config]:
    """Return the runs that `train.norm_grad=auto` chooses from, fastest first; any other run alone.

    All of them give the same gradient, but for bf16, which rounds the frozen weights: it comes last,
    and not at all where `train.precision` is set.
    """
    train = config.train
    if train.norm_grad != "auto":
        return [config]
    asked = "precision" in train.model_fields_set
    return [
        config.model_copy(
            update={"train": train.model_copy(update={"norm_grad": mode, "precision": precision})}
        )
        for precision in ([train.precision] if asked else ["fp32", "bf16"])
        for mode in ("full", "recompute", "recompute-halves")
    ]
