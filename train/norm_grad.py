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

from collections.abc import Callable, Iterable

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


class NormGradient:
    """The exact gradient, by whichever way the forward runs a block.

    Args:
        backbone: Whose norms they are.
        run: How the forward runs a block.
        first: The first block whose norms are trained; the gradient stops there.
    """

    def __init__(self, backbone: Backbone, run: Run, first: int = 0) -> None:
        self.backbone = backbone
        self.run = run
        self.first = first

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        """Return the norm parameters that are trained, by full name.

        Args:
            feature_layers: Layers (1-based) that have a feature loss.
        """
        return self._norms_of(range(self.first, self.backbone.depth))

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
        loss = top_loss(trace.ends[-1])
        trace.drop()
        loss.backward()

    def _norms_of(self, blocks: Iterable[int]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for index in blocks:
            found.update(self.backbone.block_norms(index))
        return found | self.backbone.final_norm_parameters()


class Local(NormGradient):
    """Each block's norms follow their own layer's feature loss."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        return self._norms_of(layer - 1 for layer in sorted({*feature_layers, self.backbone.depth}))

    def backward(self, trace: Trace, top_loss: TopLoss, layer_loss: LayerLoss | None) -> None:
        assert layer_loss is not None, "only mdpd has feature losses, and norms refuses local"
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
        return NormGradient(backbone, recomputed, backbone.depth - blocks)
    if mode == "recompute-halves":
        return NormGradient(backbone, recomputed_halves(_halves(backbone)))
    kind, run = {
        "recompute": (NormGradient, recomputed),
        "full": (NormGradient, plainly),
        "local": (Local, apart),
        "none": (Nothing, plainly),
    }[mode]
    return kind(backbone, run)


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
