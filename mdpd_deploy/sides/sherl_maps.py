"""SHERL beside a hierarchical network: pooled stages regulate the last block.

Source: the form for convolutional networks in the released code of SHERL (VSE∞ with ResNeXt). Every
stage but the last is pooled to the grid of the last block's input, by the sum of the greatest and
the mean token of a cell, and mapped by a 1×1 convolution with a norm behind it; the guide is that
input itself. The aggregate goes back through a 1×1 convolution, a norm and a ReLU, and the last
block reads it. What the released code pools behind that block is left to the backbone's own tail.
The norms are of the backbone's kind, as in `unipt_maps.py`.

`variant="paper"`: the gates of Eq. 1 in every map, dot-product score, a plain up map.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.layout import Layout, cells
from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides.base import FrozenBlocks, SideNetwork, SideOutput, SideShape, side_width
from mdpd_deploy.sides.maps import check_grids, map_norm
from mdpd_deploy.sides.sherl import TEMPERATURE, Aggregation, GatedMap, first_alpha


class MapSHERL(SideNetwork):
    """The ends of the stages and what block L reads → block L → side output [B, n, D].

    s_l is the mapped stage of its last layer l, and the mapped guide for l = L - 1 where block L
    reads that tap, all on the last grid.

    Args:
        layouts: Of the taps that are pooled.
        layers: Which taps those are.
        guide: Layout of what block L reads.
        depth: L.
        side_width: d.
        norm: Makes the norm behind a map.
        guided: Whether the guide is b_{L-1}.
        paper: The paper's equations.
        gate: As SHERL's.
    """

    has_last = True
    options = ("reduction", "variant", "gate")

    def __init__(
        self,
        layouts: Sequence[Layout],
        layers: Sequence[int],
        guide: Layout,
        depth: int,
        side_width: int,
        *,
        norm: Callable[[int], nn.Module],
        guided: bool = True,
        paper: bool = False,
        gate: str | float = "closed",
    ) -> None:
        super().__init__()
        assert guide.grid is not None
        self.width = d = side_width
        self.layouts, self.layers, self.coarse = tuple(layouts), tuple(layers), guide.grid
        self.last_tap = depth - 1
        self.feature_layers = (*layers, depth - 1) if guided else tuple(layers)
        self.maps = nn.ModuleList(
            GatedMap(layout.width, d)
            if paper
            else nn.Sequential(nn.Linear(layout.width, d), norm(d))
            for layout in (*layouts, guide)
        )
        self.aggregate = Aggregation(d, learned_score=not paper, epsilon=1e-6 if paper else 1e-8)
        up = nn.Linear(d, guide.width)
        self.up = up if paper else nn.Sequential(up, norm(guide.width), nn.ReLU())
        self.alpha = first_alpha(gate, 1)

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: FrozenBlocks
    ) -> SideOutput:
        x = run_block.enter(self.last_tap, taps[self.last_tap])
        pooled = [
            self.pool(taps[layer], layout)
            for layer, layout in zip(self.layers, self.layouts, strict=True)
        ]
        mapped = [map_(tokens) for map_, tokens in zip(self.maps, [*pooled, x], strict=True)]
        regrouped = self.kept_small(self._regroup, mapped[-1], *mapped[:-1])
        late = self.up(regrouped) + torch.tanh(self.alpha / TEMPERATURE) * x
        features = dict(zip(self.feature_layers, mapped, strict=False))
        return SideOutput(run_block(self.last_tap, late), features)

    def pool(self, x: Tensor, layout: Layout) -> Tensor:
        """Greatest plus mean token of every cell of the guide's grid: [B, N, C] → [B, n, C]."""
        assert layout.grid is not None
        grouped = cells(x, layout.grid, self.coarse)
        return grouped.amax(dim=2) + grouped.mean(dim=2)

    def _regroup(self, guide: Tensor, *shallow: Tensor) -> Tensor:
        out: Tensor = self.aggregate(torch.stack(shallow, dim=2), guide)
        return out

    def feature_layout(self, layer: int, layouts: Sequence[Layout]) -> Layout:
        """Return how s_l lies: in the side width, on the grid of what block L reads."""
        return Layout(self.width, self.coarse)

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "MapSHERL":
        """Build it for a backbone: one map per stage but the last, and the guide's."""
        if config.late_layers > 1:
            raise UserError(
                f"side.late_layers={config.late_layers}: beside a network in stages SHERL enters "
                "its last block only; leave it out."
            )
        guide, depth = shape.entry(shape.depth - 1), shape.depth
        guided = guide == shape.layouts[depth - 1]
        layers = [end for end in shape.stages[:-1] if not (guided and end == depth - 1)]
        layouts = [shape.layouts[layer] for layer in layers]
        check_grids(layouts, guide, "--side sherl")
        return cls(
            layouts,
            layers,
            guide,
            depth,
            side_width(shape, config),
            norm=map_norm(shape),
            guided=guided,
            paper=config.variant == "paper",
            gate="closed" if config.gate is None else config.gate,
        )
