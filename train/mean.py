"""An exponential mean of what is trained, over the steps: what is evaluated and deployed.

m ← decay · m + (1 - decay) · w after each step, m = w at the start (torch's and timm's own form).
Whole numbers among the tensors, such as counters of batches, are taken as they are.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mdpd_deploy.train.methods import Method


class WeightMean:
    """The mean of a method's trained state; without a decay there is none, and nothing happens.

    Args:
        method: Whose.
        decay: `train.ema`.

    Attributes:
        tensors: The mean, by the names of `Method.trained_state`; empty without a decay.
    """

    def __init__(self, method: Method, decay: float | None) -> None:
        self.method = method
        self.decay = decay
        self.tensors: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin with the state as it is."""
        if self.decay is not None:
            self.tensors = self._copy()

    def update(self) -> None:
        """Count the state after an optimiser step."""
        if self.decay is None:
            return
        now = self.method.trained_state()
        means = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        average = get_ema_multi_avg_fn(self.decay)
        average([self.tensors[name] for name in means], [now[name] for name in means], None)
        for name in self.tensors.keys() - set(means):
            self.tensors[name].copy_(now[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the mean of a checkpoint; `KeyError` if it is not of this state."""
        if tensors.keys() != self.tensors.keys():
            raise KeyError(min(tensors.keys() ^ self.tensors.keys()))
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def take(self) -> None:
        """Give the method the mean for good."""
        if self.tensors:
            self.method.load_trained_state(self.tensors)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the method have the mean in the block, and its own state again behind it."""
        own = self._copy() if self.tensors else None
        self.take()
        try:
            yield
        finally:
            if own is not None:
                self.method.load_trained_state(own)

    @torch.no_grad()
    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.method.trained_state().items()}
