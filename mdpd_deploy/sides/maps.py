"""What side networks beside hierarchical networks share: one grid for all stages, and their norms."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides.base import SideShape


class TokenBatchNorm(nn.Module):
    """Batch norm over the tokens of all pictures: [B, N, D] → [B, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])


def map_norm(shape: SideShape) -> Callable[[int], nn.Module]:
    """Return what makes the norm behind a 1×1 map: the kind of norm that the backbone has."""
    return TokenBatchNorm if shape.batch_norms else nn.LayerNorm


def check_grids(layouts: Sequence[Layout], coarse: Layout, option: str) -> None:
    """Refuse stages whose cells on the coarsest grid would not be equal.

    Raises:
        UserError: Naming the option and the first grid that does not fit.
    """
    assert coarse.grid is not None
    for layout in layouts:
        assert layout.grid is not None
        if any(fine % small for fine, small in zip(layout.grid, coarse.grid, strict=True)):
            fine, small = ("×".join(map(str, x.grid or ())) for x in (layout, coarse))
            raise UserError(
                f"{option} pools every stage to the last one's grid, and {small} does not divide "
                f"{fine}: choose a backbone.img_size that is a multiple of 32."
            )
