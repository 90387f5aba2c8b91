"""Virtual tokens: trained vectors that a frozen backbone attends to, in training and afterwards."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.config import PeftConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry


class VirtualTokens(nn.Module, ABC):
    """T trained tokens beside the N of the input.

    Args:
        backbone: What they stand beside.
        config: `tokens` is T.

    Attributes:
        default_lr: Peak learning rate, unless `optim.lr` names one.
        options: Those of the section `peft` that it reads.
    """

    default_lr: ClassVar[float]
    options: ClassVar[tuple[str, ...]] = ("tokens",)
    positions: Tensor

    def __init__(self, backbone: Backbone, config: PeftConfig) -> None:
        super().__init__()
        self.count = count = config.tokens
        self.register_buffer("positions", torch.arange(count), persistent=False)

    @abstractmethod
    def forward(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        """Run the backbone with the tokens and pool the real ones: [B, D]."""

    def extend(self, mask: Tensor | None) -> Tensor | None:
        """Let a token mask [B, N] show the virtual tokens too: [B, T + N]."""
        if mask is None:
            return None
        return torch.cat([mask.new_ones(mask.shape[0], self.count), mask], dim=1)


TOKENS: Registry[type[VirtualTokens]] = Registry("virtual tokens")


def build_tokens(backbone: Backbone, name: str, config: PeftConfig) -> VirtualTokens:
    """Build the virtual tokens that `name` names, with random values.

    Raises:
        UserError: If the backbone's attention cannot read them, or the installed peft does not
            have them.
    """
    backbone.require_taps(f"--method {name}")
    if backbone.layouts[0].axes != "BND":
        raise UserError(
            f"--method {name} trains tokens beside those of a sequence (keys and values with "
            f"prefix), and {backbone.source.name} works on maps: choose another method."
        )
    return TOKENS.get_or_raise(name)(backbone, config)
