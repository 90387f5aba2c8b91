"""A side network alone: trained in little memory, and paid for at every inference."""

from collections.abc import Mapping

from torch import Tensor, nn

from mdpd_deploy.model import pool_side
from mdpd_deploy.sides import FrozenBlocks, build_side
from mdpd_deploy.train.methods.base import METHODS, Method


@METHODS.register("side")
class Side(Method):
    """Trains the side network and its head; the backbone stays exactly as it was."""

    uses_side = True
    deploys_added = True
    deployed_head = "side_head"

    def build_modules(self) -> nn.ModuleDict:
        self.side = build_side(self.backbone, self.config.side)
        return nn.ModuleDict({"side": self.side, **super().build_modules()})

    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the side network's pooled output [B, D]."""
        trace = self.frozen_trace(self.cast(inputs), self.side.last_tap)
        with self.autocast(trace.taps[0]):
            blocks = FrozenBlocks(self.backbone, trace, blocked=True)
            output = self.side(trace.taps, trace.mask, blocks)
            return pool_side(self.backbone, self.side, output, trace.mask, blocked=True).float()
