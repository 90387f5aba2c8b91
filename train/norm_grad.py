"""How the backbone's norms get their gradient: one forward, one backward, five ways.

The forward runs before the side network and gives it its taps; the backward runs after the side
network's graph is freed. `recompute` is exact at the memory of one block:

    recompute  keep the block inputs only, walk the blocks from last to first, run each again with
               a graph and hand the gradient of its input on (methods 3.4, reading R2)
    full       the same gradient from one graph-keeping forward: fastest, most memory (R1)
    late:K     recompute, but only through the last K blocks; the norms below stay as they are (R4)
    local      each block is run again from its detached input and its norms take the gradient of
               that layer's own feature loss; a last block without a side feature takes the logits
               loss (R3, D7). Earlier blocks without one are not trained.
    none       only the head is trained

Dropout inside recomputed blocks replays its random state; the forward uses `no_grad`, never
`inference_mode`, because its tensors enter graphs later (D8).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.errors import UserError

RandomState = tuple[Tensor, Tensor | None]  # of the CPU, of the current CUDA device
LayerLoss = Callable[[int, Tensor], Tensor]  # (1-based layer, b_l) → scalar


@dataclass
class Trace:
    """One forward of the backbone.

    Attributes:
        taps: b_0..b_L [B, N, D], detached; an entry is dropped once the walk has passed it.
        mask: [B, N] or None.
        states: Random state before each block.
        top: b_L with its graph (`full` only).
    """

    taps: list[Tensor]
    mask: Tensor | None
    states: list[RandomState | None] = field(default_factory=list)
    top: Tensor | None = None


class NormGradient(ABC):
    """One of the five ways; `trained` names the norm parameters that it moves."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @abstractmethod
    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        """Return the norm parameters this mode trains, by full name."""

    def forward(self, inputs: Inputs) -> Trace:
        """Run the backbone and keep what the backward needs."""
        backbone = self.backbone
        with torch.no_grad():
            trace = Trace([backbone.embed(inputs)], backbone.token_mask(inputs))
            for index in range(backbone.depth):
                trace.states.append(random_state(backbone, trace.taps[0].device))
                trace.taps.append(backbone.run_block(index, trace.taps[-1], trace.mask))
        return trace

    @abstractmethod
    def backward(
        self, trace: Trace, top_loss: Callable[[Tensor], Tensor], layer_loss: LayerLoss | None
    ) -> None:
        """Accumulate gradients into the trained norms and into whatever `top_loss` trains.

        Args:
            trace: From `forward`; used up.
            top_loss: b_L → the backbone pass's loss (final norm, pooling and head inside).
            layer_loss: The feature loss of one layer against the detached side, for `local`.
        """

    def _again(self, trace: Trace, index: int, x: Tensor) -> Tensor:
        with replayed(trace.states[index]), torch.enable_grad():
            return self.backbone.run_block(index, x, trace.mask)

    def _top(self, trace: Trace, top_loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Back-propagate the top loss to b_L and return the gradient there."""
        top = trace.taps[-1].detach().requires_grad_()
        top_loss(top).backward()
        assert top.grad is not None
        return top.grad


class Recompute(NormGradient):
    """Exact, with the activations of one block at a time; stops above the first trained block."""

    def __init__(self, backbone: Backbone, first: int = 0) -> None:
        super().__init__(backbone)
        self.first = first

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for index in range(self.first, self.backbone.depth):
            found.update(self.backbone.block_norms(index))
        return found | self.backbone.final_norm_parameters()

    def backward(
        self, trace: Trace, top_loss: Callable[[Tensor], Tensor], layer_loss: LayerLoss | None
    ) -> None:
        gradient = self._top(trace, top_loss)
        for index in reversed(range(self.first, self.backbone.depth)):
            trace.taps.pop()
            x = trace.taps[-1].detach().requires_grad_(index > self.first)
            torch.autograd.backward(self._again(trace, index, x), gradient)
            if x.grad is not None:
                gradient = x.grad


class Full(NormGradient):
    """Exact, keeping every activation."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        return self.backbone.norms()

    def forward(self, inputs: Inputs) -> Trace:
        backbone = self.backbone
        with torch.no_grad():
            x = backbone.embed(inputs)
        trace = Trace([x], backbone.token_mask(inputs))
        for index in range(backbone.depth):
            x = backbone.run_block(index, x, trace.mask)
            trace.taps.append(x.detach())
        trace.top = x
        return trace

    def backward(
        self, trace: Trace, top_loss: Callable[[Tensor], Tensor], layer_loss: LayerLoss | None
    ) -> None:
        assert trace.top is not None
        top_loss(trace.top).backward()


class Local(NormGradient):
    """Each block's norms follow their own layer's feature loss."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for layer in sorted({*feature_layers, self.backbone.depth}):
            found.update(self.backbone.block_norms(layer - 1))
        return found | self.backbone.final_norm_parameters()

    def backward(
        self, trace: Trace, top_loss: Callable[[Tensor], Tensor], layer_loss: LayerLoss | None
    ) -> None:
        if layer_loss is None:
            raise UserError(
                "train.norm_grad=local needs the feature losses of --method mdpd; "
                "use recompute, full or late:K."
            )
        gradient = self._top(trace, top_loss)
        for index in reversed(range(self.backbone.depth)):
            trace.taps.pop()
            last = index == self.backbone.depth - 1
            output = self._again(trace, index, trace.taps[-1].detach())
            loss = layer_loss(index + 1, output)
            if loss.requires_grad:
                loss.backward()
            elif last:
                torch.autograd.backward(output, gradient)


class Nothing(NormGradient):
    """No norm is trained; the loss reaches the head only."""

    def trained(self, feature_layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
        return {}

    def backward(
        self, trace: Trace, top_loss: Callable[[Tensor], Tensor], layer_loss: LayerLoss | None
    ) -> None:
        top_loss(trace.taps[-1]).backward()


def build_norm_gradient(mode: str, backbone: Backbone) -> NormGradient:
    """Return the engine for `train.norm_grad`."""
    if mode.startswith("late:"):
        blocks = int(mode.removeprefix("late:"))
        if blocks > backbone.depth:
            raise UserError(
                f"train.norm_grad={mode}: the backbone has {backbone.depth} blocks; "
                f"use late:K with K from 1 to {backbone.depth}."
            )
        return Recompute(backbone, backbone.depth - blocks)
    return {"recompute": Recompute, "full": Full, "local": Local, "none": Nothing}[mode](backbone)


def random_state(backbone: nn.Module, device: torch.device) -> RandomState | None:
    """Return the generators' states, or None where no dropout can draw."""
    if not backbone.training:
        return None
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


@contextmanager
def replayed(state: RandomState | None) -> Iterator[None]:
    """Run a block from an earlier random state and put the present one back."""
    if state is None:
        yield
        return
    cpu, cuda = state
    with torch.random.fork_rng(devices=[] if cuda is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        yield
