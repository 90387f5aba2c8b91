"""SHERL: early layers are aggregated without redundancy and regulate the last, late layer.

Source: "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer
Learning" (ECCV 2024) and its released code. The aggregate of b_0..b_{L-1} replaces the input of
block L, which runs inside the side network's graph (weights frozen, norm gradients blocked).
Everything but that block is per token, so no padding mask is needed here.

With `late_layers` = k > 1 the last k blocks are late (multi-layer insertion, of which the paper has
a figure and no code): each is entered through an aggregate of its own, and what a late block
returns takes its tap's place in the next aggregate. The choices left open: the maps, the score and
the up map are shared by all insertions; each has its own α.

`variant="reference"`: learned score Lin(d→1) of E ⊙ e, ReLU before the up map; text takes the
VSE∞ flavour (Lin + LayerNorm per layer, LayerNorm and dropout after the up map), vision the
CLIP-ViL flavour (the gates of Eq. 1). `variant="paper"`: Eq. 1 everywhere, dot-product score,
no ReLU before the up map. Both gate only the old input with tanh(α/T): the released code has no
(1 − u) on the new one. There α starts at 0, and the late block reads the aggregate alone. Beside a
pre-norm backbone that cuts its residual stream off, and for a hundred steps what is kept stays below a
linear probe: there the gate starts open by default (`side.gate`; CIFAR-10 in docs/accuracy.md).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides.base import (
    SIDES,
    FrozenBlocks,
    SideNetwork,
    SideOutput,
    SideShape,
    side_width,
)
from mdpd_deploy.sides.unipt import init_linears

TEMPERATURE = 0.1
GATES = {"closed": 0.0, "open": 0.95}  # tanh(α/T) at the start; at 1 α would be infinite


def first_alpha(gate: str | float, insertions: int) -> nn.Parameter:
    """Return α of every insertion for gates tanh(α/T) that start by a name of GATES or at a number."""
    start = GATES[gate] if isinstance(gate, str) else gate
    return nn.Parameter(torch.full((insertions,), TEMPERATURE * math.atanh(start)))


class GatedMap(nn.Module):
    """Eq. 1: x = ReLU(fc1 b), F̂ = σ(fc3 x) ⊙ (fc2 x + x): [B, N, D] → [B, N, d]."""

    def __init__(self, width: int, side_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, side_width)
        self.fc2 = nn.Linear(side_width, side_width)
        self.fc3 = nn.Linear(side_width, side_width)

    def forward(self, tap: Tensor) -> Tensor:
        x = torch.relu(self.fc1(tap))
        return (self.fc2(x) + x) * torch.sigmoid(self.fc3(x))


class Aggregation(nn.Module):
    """MTSA: the shallow set E regrouped around the guide e, token by token (Eq. 2-3).

    Args:
        side_width: d.
        learned_score: Lin(d→1) of E ⊙ e (reference) instead of the dot product (paper).
        epsilon: Smallest divisor (1e-6; VSE 1e-8). The reference adds it; the ONNX optimiser drops
            an added 1e-8 as a zero, so that a row of zeros became NaN.
    """

    def __init__(self, side_width: int, *, learned_score: bool, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.score = nn.Linear(side_width, 1) if learned_score else None
        self.epsilon = epsilon

    def forward(self, shallow: Tensor, guide: Tensor) -> Tensor:
        """shallow [B, N, n, d], guide [B, N, d] → e' [B, N, d].

        Products are contracted at once, so that no second [B, N, n, d] tensor is made.
        """
        return (self.weights(shallow, guide).unsqueeze(-2) @ shallow).squeeze(-2) + guide

    def weights(self, shallow: Tensor, guide: Tensor) -> Tensor:
        """m [B, N, n]: scores divided by redundancy, normalised to sum 1 (or all 0)."""
        query = guide if self.score is None else guide * self.score.weight.squeeze(0)
        score = (shallow @ query.unsqueeze(-1)).squeeze(-1)
        if self.score is not None:
            score = score + self.score.bias
        score = torch.relu(score) / self.redundancy(shallow)
        return score / score.sum(dim=-1, keepdim=True).clamp_min(self.epsilon)

    def redundancy(self, shallow: Tensor) -> Tensor:
        """r_j = Σ_i ReLU(cos(E_i, E_j)) ∈ [1, n]: [B, N, n]."""
        norm = shallow.norm(dim=-1).clamp_min(self.epsilon)
        cosine = shallow @ shallow.transpose(-1, -2) / norm.unsqueeze(-1) / norm.unsqueeze(-2)
        return torch.relu(cosine).sum(dim=-1)


@SIDES.register("sherl")
class SHERL(SideNetwork):
    """Taps b_0..b_{L-k} → k × (aggregate → late block) → side output [B, N, D].

    s_l is the mapped F̂_l for l = 1..L-1; the last layer has none but the side output itself.

    Args:
        width: D.
        depth: L, at least 2.
        side_width: d.
        gated: The gates of Eq. 1 in each map; else Lin + LayerNorm (VSE∞).
        late_layers: k, from 1 to L - 1.
        paper: Dot-product score and no ReLU before the up map.
        gate: See `first_alpha`.
        epsilon: Of the aggregation.
        init_std: Standard deviation of the weights; None keeps PyTorch's default.
    """

    has_last = True
    options = ("reduction", "variant", "late_layers", "gate")

    def __init__(
        self,
        width: int,
        depth: int,
        side_width: int,
        *,
        gated: bool,
        late_layers: int = 1,
        paper: bool = False,
        gate: str | float = "closed",
        epsilon: float = 1e-6,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if depth < 2:
            raise UserError("side.name=sherl needs a backbone of at least 2 blocks; use unipt.")
        if not 1 <= late_layers < depth:
            raise UserError(
                f"side.late_layers={late_layers} does not fit a backbone of {depth} blocks: "
                f"give 1 to {depth - 1}."
            )
        self.width = side_width
        self.last_tap = depth - late_layers
        self.feature_layers = tuple(range(1, depth))
        d = side_width
        self.maps = nn.ModuleList(
            GatedMap(width, d) if gated else nn.Sequential(nn.Linear(width, d), nn.LayerNorm(d))
            for _ in range(depth)
        )
        self.aggregate = Aggregation(d, learned_score=not paper, epsilon=epsilon)
        up: list[nn.Module] = [] if paper else [nn.ReLU()]
        up.append(nn.Linear(d, width))
        if not gated:
            up += [nn.LayerNorm(width, eps=1e-12), nn.Dropout(0.1)]
        self.up = nn.Sequential(*up)
        self.alpha = first_alpha(gate, late_layers)
        if init_std is not None:
            init_linears(self, init_std)

    def late_input(self, mapped: Sequence[Tensor], x: Tensor, insertion: int = 0) -> Tensor:
        """Return the regulated input [B, N, D] of a late block.

        Args:
            mapped: F̂ of every layer below it [B, N, d], the guide last.
            x: What the block would have read [B, N, D].
            insertion: Which of the late blocks, from 0.
        """
        regrouped = self.kept_small(self._regroup, mapped[-1], *mapped[:-1])
        return self.up(regrouped) + torch.tanh(self.alpha[insertion] / TEMPERATURE) * x

    def _regroup(self, guide: Tensor, *shallow: Tensor) -> Tensor:
        return self.aggregate(torch.stack(shallow, dim=2), guide)

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: FrozenBlocks
    ) -> SideOutput:
        x = taps[self.last_tap]
        mapped = [self.kept_small(map_, tap) for map_, tap in zip(self.maps, taps, strict=False)]
        for insertion, index in enumerate(range(self.last_tap, len(self.maps))):
            if insertion:
                mapped.append(self.kept_small(self.maps[index], x))
            x = run_block(index, self.late_input(mapped, x, insertion))
        return SideOutput(x, dict(enumerate(mapped[1:], start=1)))

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "SHERL":
        """Build SHERL for a backbone: VSE flavour beside text, CLIP-ViL beside vision."""
        paper = config.variant == "paper"
        return cls(
            shape.width,
            shape.depth,
            side_width(shape, config),
            gated=paper or not shape.text,
            late_layers=config.late_layers,
            paper=paper,
            gate=first_gate(shape) if config.gate is None else config.gate,
            epsilon=1e-8 if shape.text and not paper else 1e-6,
            init_std=None if shape.text else 0.02,
        )


def first_gate(shape: SideShape) -> str:
    """Return how gates start: open beside a backbone that ends in a norm, as pre-norm ones do."""
    final = None if shape.backbone is None else shape.backbone.final_norm()
    return "closed" if final is None else "open"
