"""UniPT: a parallel network that blends every layer under the guidance of the last one.

Source: "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and
Memory" (CVPR 2024) and its released code. `variant="reference"` follows the code, in two flavours:

* text (VSE∞ BERT): LayerNorm after each down map, one d→d projection, ReLU before the up map;
* vision (CLIP-ViL): the projection is d→D→d, no ReLU before the up map, N(0, 0.02²) init.

`variant="paper"` follows the equations: no LayerNorm, confidence from the blended features, a
bias-free W₃ReLU(W₂·), no ReLU before the up map. In both, padded keys are masked before the L1
norm and the means of the confidence run over real tokens, so padding changes nothing on them.
Beside a network in stages it takes the form for maps (`unipt_maps.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mdpd_deploy.config import SideConfig
from mdpd_deploy.sides.base import (
    SIDES,
    FrozenBlocks,
    SideNetwork,
    SideOutput,
    SideShape,
    side_width,
)


@SIDES.register("unipt")
class UniPT(SideNetwork):
    """Some of the taps [B, N, D] → side output [B, N, E].

    s_l is the blended F'_l for l below the last one and F^C for the last (F'_0 is no layer's output
    and is unused).

    Args:
        widths: D of each tap that is read, the guide last.
        side_width: d.
        out_width: E, width of the output; D beside a backbone.
        layers: Which taps are read; None means all.
        paper: The paper's equations instead of the released code.
        deep_projection: d→D→d instead of d→d for the blended sum (reference only).
        relu_up: ReLU before the up map (reference only).
        epsilon: Smallest L1 norm of a row (1e-8 text, 1e-6 vision). The reference adds it; the
            ONNX optimiser drops an added 1e-8 as a zero, so that a row of zeros became NaN.
        init_std: Standard deviation of the weights; None keeps PyTorch's default.
        norm: Makes the norm behind a map (reference only).
    """

    has_last = True
    options = ("reduction", "variant", "projection")
    layers: tuple[int, ...]

    def __init__(
        self,
        widths: Sequence[int],
        side_width: int,
        *,
        out_width: int,
        layers: Sequence[int] | None = None,
        paper: bool = False,
        deep_projection: bool = False,
        relu_up: bool = True,
        epsilon: float = 1e-8,
        init_std: float | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.width = d = side_width
        self.layers = tuple(range(len(widths)) if layers is None else layers)
        self.last_tap = self.layers[-1]
        self.feature_layers = tuple(layer for layer in self.layers if layer)
        self.paper = paper
        self.epsilon = epsilon
        width = widths[-1]
        if paper:
            self.down = nn.ModuleList(nn.Linear(width, d) for width in widths)
            self.gate = nn.Linear(d, 1, bias=False)
            self.project: nn.Module = nn.Sequential(
                nn.Linear(d, width, bias=False), nn.ReLU(), nn.Linear(width, d, bias=False)
            )
            self.up: nn.Module = nn.Linear(d, out_width)
        else:
            self.down = nn.ModuleList(
                nn.Sequential(nn.Linear(width, d), norm(d)) for width in widths
            )
            self.gate = nn.Linear(d, 1)
            inner = (
                [nn.Linear(d, width), nn.ReLU(), nn.Linear(width, d)]
                if deep_projection
                else [nn.Linear(d, d)]
            )
            self.project = nn.Sequential(*inner, norm(d))
            up = nn.Linear(d, out_width)
            self.up = nn.Sequential(nn.ReLU(), up) if relu_up else up
        if init_std is not None:
            init_linears(self, init_std)

    def read(self, taps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what is mapped down, [B, N, D] of each layer that is read."""
        return taps

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: FrozenBlocks
    ) -> SideOutput:
        down = [layer(tap) for layer, tap in zip(self.down, self.read(taps), strict=True)]
        guide = down[-1]
        blended = [self.kept_small(self._blend, guide, feature, mask) for feature in down[:-1]]
        confidence = self._confidence(guide, blended if self.paper else down[:-1], mask)
        total = sum_weighted(blended, confidence)
        last = guide + self.project(total)
        features = dict(zip(self.layers, [*blended, last], strict=True))
        features.pop(0, None)
        return SideOutput(self.up(last), features)

    def _blend(self, guide: Tensor, feature: Tensor, mask: Tensor | None) -> Tensor:
        """F'_i = (L1norm(ReLU(F_L F_iᵀ)) + I) F_i, keys at padding left out.

        The product with the norm's reciprocal comes after the product with F_i, so no second
        [B, N, N] tensor is kept; the identity is the residual.
        """
        weight = torch.relu(guide @ feature.transpose(1, 2))  # [B, N, N]
        if mask is not None:
            weight = weight * mask.to(weight.dtype).unsqueeze(1)
        norm = weight.sum(dim=-1, keepdim=True)
        norm = norm.clamp_min(1e-12 if self.paper else self.epsilon)
        return weight @ feature / norm + feature

    def _confidence(self, guide: Tensor, features: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Softmax over layers of W₁(mean F_L ⊙ mean F_i): [B, L]."""
        query = masked_mean(guide, mask)
        means = torch.stack([masked_mean(feature, mask) for feature in features], dim=1)
        gates: Tensor = self.gate(query.unsqueeze(1) * means)
        return gates.squeeze(-1).softmax(dim=-1)

    def read_feature(self) -> None:
        """Leave out the up map, which would get no gradient."""
        super().read_feature()
        self.up = nn.Identity()

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "UniPT":
        """Build UniPT for a backbone: VSE flavour beside text, CLIP-ViL beside vision."""
        deep = config.projection == "d-D-d" or (config.projection == "auto" and not shape.text)
        return cls(
            [layout.width for layout in shape.layouts],
            side_width(shape, config),
            out_width=shape.width,
            paper=config.variant == "paper",
            deep_projection=deep,
            relu_up=shape.text,
            epsilon=1e-8 if shape.text else 1e-6,
            init_std=None if shape.text else 0.02,
        )


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x [B, N, d] over real tokens: [B, d]."""
    if mask is None:
        return x.mean(dim=1)
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(dim=1) / weight.sum(dim=1)


def sum_weighted(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_i weights[:, i] · features[i]: [B, N, d]."""
    total = weights[:, 0, None, None] * features[0]
    for index, feature in enumerate(features[1:], start=1):
        total = torch.addcmul(total, weights[:, index, None, None], feature)  # nothing stacked
    return total


def init_linears(module: nn.Module, std: float) -> None:
    """Draw every linear weight from N(0, std²) and set every linear bias to 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
