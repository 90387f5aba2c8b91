"""LST: a ladder of thinner copies of the backbone's blocks, fed from every layer.

Source: "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning" (NeurIPS
2022) and its released code. Per layer: h ← μ h + (1 − μ) Lin(b_l) with μ = σ(α_l / 0.1), then the
side block. Following the released code the mix comes before the block and every backbone layer
keeps its ladder. Text follows the CLIP-ViL flavour (maps without bias, no final norm,
r = 4), vision the form that gives the 2.38 M parameters reported for ViT-B (maps with bias, a
final norm, r = 8). The first weights are inherited from the backbone (`pruning.py`).

The side output is pooled as the deployed model's is: on a vision transformer the
up-projected tokens pass the backbone's own frozen final norm before the head, which the released
code, of text only, does not have.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Thinnable
from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides.base import (
    SIDES,
    FrozenBlocks,
    Importance,
    SideNetwork,
    SideOutput,
    SideShape,
    side_width,
)
from mdpd_deploy.sides.pruning import copy_largest
from mdpd_deploy.sides.unipt import init_linears

TEMPERATURE = 0.1


@SIDES.register("lst")
class LST(SideNetwork):
    """Taps b_0..b_L [B, N, D] → side output [B, N, E]; s_l is the output of side block l.

    Args:
        width: D.
        side_width: d.
        blocks: L blocks of width d.
        out_width: E; D beside a backbone.
        bias: Of the first, the ladder's and the up map.
        norm: Applied to the last side feature before the up map; None for none.
    """

    has_last = True
    options = ("reduction", "init")

    def __init__(
        self,
        width: int,
        side_width: int,
        blocks: Sequence[nn.Module],
        *,
        out_width: int,
        bias: bool,
        norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.width = side_width
        self.last_tap = len(blocks)
        self.feature_layers = tuple(range(1, len(blocks) + 1))
        self.first = nn.Linear(width, side_width, bias=bias)
        self.ladder = nn.ModuleList(nn.Linear(width, side_width, bias=bias) for _ in blocks)
        self.alpha = nn.Parameter(torch.zeros(len(blocks)))
        self.blocks = nn.ModuleList(blocks)
        up = nn.Linear(side_width, out_width, bias=bias)
        self.up: nn.Module = up if norm is None else nn.Sequential(norm, up)
        for part in (self.first, self.ladder, up):
            init_linears(part, 0.01)

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: FrozenBlocks
    ) -> SideOutput:
        h = self.first(taps[0])
        gates = torch.sigmoid(self.alpha / TEMPERATURE).unbind()
        features = {}
        for layer, (gate, step, block, tap) in enumerate(
            zip(gates, self.ladder, self.blocks, taps[1:], strict=True), start=1
        ):
            h = run_block(layer - 1, gate * h + (1 - gate) * step(tap), block=block)
            features[layer] = h
        return SideOutput(self.up(h), features)

    def inherit(self, backbone: Backbone, importance: Importance) -> None:
        """Copy the most important units of the backbone's layers into the blocks and the norm."""
        assert isinstance(backbone, Thinnable)
        norm = self.up[0] if isinstance(self.up, nn.Sequential) else None
        copy_largest(backbone, self.blocks, norm, importance)

    def read_feature(self) -> None:
        """Leave out the up map, which would get no gradient."""
        super().read_feature()
        self.up = nn.Identity()

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "LST":
        """Build LST for a backbone: CLIP-ViL flavour beside text, ViT flavour beside vision."""
        backbone = shape.backbone
        if len(shape.stages) > 1:
            raise UserError(
                "side.name=lst copies blocks of one width, and this backbone works in stages of "
                "growing width: use unipt, sherl, dtlv1, dtlv2 or dtlv2-ls."
            )
        if not isinstance(backbone, Thinnable):
            raise UserError(
                "side.name=lst is made of thinner copies of the backbone's blocks, and none are "
                "known here: use another side network."
            )
        default = 4 if shape.text else 8
        d = side_width(shape, config, default=default, heads=backbone.heads)
        blocks = [backbone.thin_block(index, shape.width // d) for index in range(shape.depth)]
        for block in blocks:
            init_linears(block, 0.02)
        norm = None if shape.text else nn.LayerNorm(d)
        side = cls(
            shape.width,
            d,
            blocks,
            out_width=shape.width,
            bias=not shape.text,
            norm=norm,
        )
        if config.init != "random":  # fisher starts here too: its importance needs examples
            side.inherit(backbone, importance=torch.abs)
        return side
