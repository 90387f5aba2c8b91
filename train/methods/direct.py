"""Task loss through the backbone by plain back-propagation: the floor, and the rivals of much memory.

`probe` trains the head alone, on frozen features: no activation is kept. `full` trains every weight,
`bitfit` every bias (BitFit, ACL 2022): both keep all activations of the backbone. What they deploy
is again backbone + head, with other values.
"""

from collections.abc import Mapping

from torch import Tensor

from mdpd_deploy.train.methods.base import METHODS, Method, Parameters


@METHODS.register("probe")
class Probe(Method):
    """Trains the head only: what every other method must beat."""

    default_lr = 1e-2  # a fresh linear map follows a higher rate (measured: docs/accuracy.md)


class Direct(Method):
    """Trains some of the backbone's weights, and the head."""

    backbone_group = "backbone"

    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the pooled features [B, D], float32; in bf16 runs all of it is in autocast."""
        with self.autocast(next(iter(inputs.values()))):
            return self.encode(self.cast(inputs)).float()

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the network that is trained: [B, D]."""
        return self.backbone(inputs)


@METHODS.register("full")
class Full(Direct):
    """Trains every weight of the backbone: the ceiling of memory, and often of accuracy."""

    default_lr = 5e-5
    holds_frozen = False  # nothing is frozen

    def tuned(self) -> Parameters:
        return dict(self.backbone.named_parameters())


@METHODS.register("bitfit")
class BitFit(Direct):
    """Trains every bias of the backbone's blocks and of its final norm."""

    def tuned(self) -> Parameters:
        blocks = {id(weight) for block in self.backbone.blocks() for weight in block.parameters()}
        inside = self.backbone.final_norm_parameters()
        return {
            name: p
            for name, p in self.backbone.named_parameters()
            if name.rpartition(".")[2] == "bias" and (id(p) in blocks or name in inside)
        }
