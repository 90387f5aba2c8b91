"""Linear probe: the head on frozen features, the floor every other method must beat."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdpd_deploy.train.methods.base import METHODS, Batch, Method, Parameters, Parts


@METHODS.register("probe")
class Probe(Method):
    """Trains the head only; no backbone activation is kept."""

    default_lr = 1e-2  # a fresh linear map follows a higher rate (measured: docs/accuracy.md)

    def build_modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"head": self.new_head()})

    def tuned(self) -> Parameters:
        return {}

    def step(self, batch: Batch) -> Parts:
        with torch.no_grad():
            pooled = self.backbone(self.cast(batch.inputs))
        return self.learn(self.head("head").raw(pooled.float()), batch)

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"deployed": self.modules["head"](self.backbone(self.cast(inputs)).float())}
