"""UniPT beside a hierarchical network: one tap per stage, brought to the last stage's grid.

Source: the form for convolutional networks in the released code of UniPT (VSE∞ with ResNeXt). In
every cell of the last grid a stage's tokens are summed with weights that its last token asks for:

    q = ReLU(Lin(b_L))         [B, n, C]: one query per cell, in the stage's width
    e = Σ_channels q ⊙ b       one number for every token of the cell
    w = ReLU(e) / (Σ_cell ReLU(e) + 1e-8) + 1 / size of the cell

so that a cell without an answer gives its plain mean. What follows is UniPT's own, in the flavour
for text with one d→d projection. 1×1 convolutions are linear maps of tokens. Behind them stands the
kind of norm that the backbone has: batch norms beside ResNet and EfficientNet, as released, layer
norms beside Swin and ConvNeXt, where none is. A stage ends where the grid changes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.layout import Layout, cells
from mdpd_deploy.config import SideConfig
from mdpd_deploy.sides.base import SideShape, side_width
from mdpd_deploy.sides.maps import check_grids, map_norm
from mdpd_deploy.sides.unipt import UniPT


class PreInteraction(nn.Module):
    """A stage's tokens summed in the cells of the guide's grid: [B, N, C], [B, n, D] → [B, n, C]."""

    def __init__(self, stage: Layout, guide: Layout) -> None:
        super().__init__()
        assert stage.grid is not None and guide.grid is not None
        self.query = nn.Linear(guide.width, stage.width)
        self.grid, self.coarse = stage.grid, guide.grid

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        grouped = cells(x, self.grid, self.coarse)
        weight = self.weights(grouped, guide).unsqueeze(-2)
        return (weight @ grouped).squeeze(-2)

    def weights(self, grouped: Tensor, guide: Tensor) -> Tensor:
        """Return w [B, n, tokens of a cell]."""
        query = torch.relu(self.query(guide)).unsqueeze(-1)
        answer = torch.relu(grouped @ query).squeeze(-1)
        share = answer / answer.sum(dim=-1, keepdim=True).clamp_min(1e-8)
        return share + 1 / answer.shape[-1]


class MapUniPT(UniPT):
    """The last tap of every stage → side output [B, n, D] on the last stage's grid.

    s_l of a stage's last layer is its blended F'_l, and F^C for l = L, all on the last grid.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        layers: Sequence[int],
        side_width: int,
        *,
        norm: Callable[[int], nn.Module],
        paper: bool = False,
        deep_projection: bool = False,
    ) -> None:
        super().__init__(
            [layout.width for layout in layouts],
            side_width,
            out_width=layouts[-1].width,
            layers=layers,
            paper=paper,
            deep_projection=deep_projection,
            norm=norm,
        )
        self.ends = tuple(layers)
        self.before = nn.ModuleList(PreInteraction(x, layouts[-1]) for x in layouts[:-1])

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "MapUniPT":
        """Build it for a backbone: one tap per stage."""
        layouts = [shape.layouts[layer] for layer in shape.stages]
        check_grids(layouts, layouts[-1], "--side unipt")
        return cls(
            layouts,
            shape.stages,
            side_width(shape, config),
            norm=map_norm(shape),
            paper=config.variant == "paper",
            deep_projection=config.projection == "d-D-d",
        )

    def read(self, taps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Bring each stage to the last grid."""
        guide = taps[self.last_tap]
        pairs = zip(self.before, self.ends, strict=False)
        return [*(self.kept_small(sum_, taps[layer], guide) for sum_, layer in pairs), guide]

    def feature_layout(self, layer: int, layouts: Sequence[Layout]) -> Layout:
        """Return how s_l lies: in the side width, on the last stage's grid."""
        return Layout(self.width, layouts[-1].grid)
