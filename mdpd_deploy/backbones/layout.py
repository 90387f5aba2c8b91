"""How the tokens of a tap lie: width, grid, and the form in which the library holds them.

Side networks see every tap as tokens [B, N, D], the prefix tokens first and a map row by row.
Blocks of convolutional and windowed networks work on maps, with channels last or first.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the tokens of one tap lie.

    Attributes:
        width: D.
        grid: (rows, columns) of the patches or of the map; None for text.
        prefix: Class and register tokens in front of the patches; a map has none.
        axes: The library's order: tokens "BND", or a map "BHWC" or "BCHW".
    """

    width: int
    grid: tuple[int, int] | None = None
    prefix: int = 0
    axes: Literal["BND", "BHWC", "BCHW"] = "BND"

    def tokens(self, x: Tensor) -> Tensor:
        """Return the library's state as tokens [B, N, D]; a view wherever memory allows one."""
        if self.axes == "BCHW":
            return x.flatten(2).transpose(1, 2)
        return x.flatten(1, 2) if self.axes == "BHWC" else x

    def state(self, x: Tensor) -> Tensor:
        """Return tokens [B, N, D] in the library's form; the inverse of `tokens`."""
        if self.axes == "BND":
            return x
        assert self.grid is not None
        if self.axes == "BHWC":
            return x.unflatten(1, self.grid)
        return x.transpose(1, 2).unflatten(2, self.grid).contiguous()


def cells(x: Tensor, grid: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """Group a map's tokens by the cells of a coarser grid.

    Args:
        x: [B, H W, D], row by row.
        grid: (H, W).
        coarse: (h, w), which divides the grid.

    Returns:
        [B, h w, (H / h) (W / w), D], cells and the tokens in a cell row by row.
    """
    (rows, columns), (height, width) = grid, coarse
    split = x.unflatten(1, (height, rows // height, width, columns // width))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)
