"""The one interface of side networks: taps in, side features and the side output out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry

RunBlock = Callable[[int, Tensor], Tensor]  # (block index, x) → x, norm gradients blocked (D1)


@dataclass(frozen=True)
class SideShape:
    """What a side network must know of the backbone it sits beside."""

    family: str
    width: int  # D
    depth: int  # L
    text: bool

    @property
    def default_reduction(self) -> int:
        """r of D5: 8 for text, 2 for vision."""
        return 8 if self.text else 2


@dataclass
class SideOutput:
    """What a side network returns.

    Attributes:
        tokens: The side output [B, N, D]; it goes where the backbone's last features would go.
        features: s_l by 1-based layer [B, N, D_S]; only the layers that have one (D6).
    """

    tokens: Tensor
    features: dict[int, Tensor]


class SideNetwork(nn.Module, ABC):
    """A trained network that reads detached backbone taps.

    Attributes:
        width: D_S.
        last_tap: The highest tap b_l that it reads; the backbone need not run past it (D23).
        feature_layers: The layers l that have an s_l, ascending (D6).
    """

    width: int
    last_tap: int
    feature_layers: tuple[int, ...]

    @abstractmethod
    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: RunBlock
    ) -> SideOutput:
        """Run the side network.

        Args:
            taps: b_0..b_{last_tap}, each [B, N, D], detached.
            mask: [B, N], 1 = real token; None when nothing is padded.
            run_block: Runs a backbone block with blocked norm gradients, for side networks whose
                graph contains late blocks.
        """

    def kept_small(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Call a function without dropout; in training it keeps no tensor of its own.

        What it would keep is computed again in the backward pass.
        """
        if not (self.training and torch.is_grad_enabled()):
            return function(*inputs)
        result: Tensor = checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return result


SIDES: Registry[Callable[[SideShape, SideConfig], SideNetwork]] = Registry("side.name (--side)")


def side_width(shape: SideShape, config: SideConfig) -> int:
    """Return D_S = D / r; raises `UserError` naming the valid r when it does not divide (D4, D5)."""
    reduction = config.reduction or shape.default_reduction
    valid = [r for r in range(1, shape.width + 1) if shape.width % r == 0 and shape.width // r >= 8]
    if reduction not in valid:
        raise UserError(
            f"side.reduction={reduction} does not fit a backbone of width {shape.width}: the side "
            f"width must be whole and at least 8. Valid values: {', '.join(map(str, valid))}."
        )
    return shape.width // reduction
