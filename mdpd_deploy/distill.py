"""MDPD's feature distillation, backbone → side network (paper Eq. 1, 2, 4-7).

Shallow layers are imitated directly, deep layers are generated behind a mask:

    Eq. 1    φ_l(s) = (s M_down) M_up                      [B, N, D_S] → [B, N, D_B], both biases
    Eq. 4    L_sha  = Σ_tokens Σ_channels (b_l − φ_l(s_l))²
    Eq. 5-7  L_deep = Σ_tokens m Σ_channels (b_l − G_l(s̄_l))²,  s̄ = f_mask where m, else φ_l(s_l)

Readings that the paper leaves open, each a default here: targets b_l are detached;
one mask per example, drawn anew each step and shared by all deep layers (`distill.mask_level`);
it hides tokens after the bottleneck, never class, register or padding tokens; G is depth-wise
(3×3 on the patch grid, k = 3 on text) because a full 3×3 at width D_B would cost more than the
whole reported budget; class and register tokens of images skip G; padding is left out of every sum
and zeroed before each convolution; sums over tokens and channels, mean over the batch, which makes
the paper's 4e-5 commensurate with a cross-entropy (`distill.feature_mean` takes means instead);
layers with an s_l are split in two halves, the first one rounded up. Initial values: PyTorch's
defaults, f_mask ~ N(0, 0.02²).

`distill.mask_tokens=all` is Eq. 5 to the letter: the mask covers all N tokens. A class or register
token has no place on the grid and passes G as a map of its own, of one token.

`distill.gen_conv=full` is the other reading of "two 3×3 convolutions": they mix channels, which the
budget allows at width d only, so mask and G lie inside the bottleneck, G_l(s̄) = G(s̄) M_up with
s̄ = f_mask where m, else s M_down. With one φ and one G (`share_phi`, `share_gen`: the paper's have no
index) and d = D_S / 4 a ViT-B gains 0.316 M numbers, norms included; the paper reports 0.31.

Where s_l lies on a coarser grid than b_l (networks in stages), its target is the mean of b_l in each
cell: the gradient is then, up to the number of tokens in a cell, that of Eq. 4 against s_l repeated
over the cell. φ, f_mask and G have the width of their layer, G the grid of its s_l, and layers of
other grids share the mask of the coarsest one, repeated over its cells.

Each layer's term is recomputed in the backward pass, otherwise its [B, N, D_B] tensors of all
layers together would be the peak of the training step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mdpd_deploy.backbones.layout import Layout, cells
from mdpd_deploy.config import DistillConfig


class Bottleneck(nn.Module):
    """φ of Eq. 1: D_S → d → D_B, linear, with biases: (1 + D_S + D_B) d + D_B parameters."""

    def __init__(self, side_width: int, bottleneck: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(side_width, bottleneck, bias=bias)
        self.up = nn.Linear(bottleneck, width, bias=bias)

    def forward(self, feature: Tensor) -> Tensor:
        return self.up(self.down(feature))


class Generator(nn.Module):
    """G: conv 3 → ReLU → conv 3, on the patch grid or along the text.

    Args:
        layout: Width, grid and prefix tokens.
        full: Whether the convolutions mix channels; else they are depth-wise.
        reads_prefix: Whether each prefix token passes as a map of its own; else unchanged.
    """

    def __init__(self, layout: Layout, *, full: bool = False, reads_prefix: bool = False) -> None:
        super().__init__()
        width, self.grid, self.prefix = layout.width, layout.grid, layout.prefix
        self.reads_prefix = reads_prefix
        conv = nn.Conv2d if self.grid else nn.Conv1d
        groups = 1 if full else width
        self.first = conv(width, width, 3, padding=1, groups=groups)
        self.second = conv(width, width, 3, padding=1, groups=groups)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, D], mask [B, N] (1 = real token) → [B, N, D]."""
        head, body = x[:, : self.prefix], x[:, self.prefix :].transpose(1, 2)
        keep = None if mask is None else mask[:, self.prefix :].to(x.dtype).unsqueeze(1)
        body = body.unflatten(2, self.grid) if self.grid else body
        body = self._generate(body, keep).flatten(2).transpose(1, 2)
        if self.reads_prefix and self.prefix:
            alone = head.flatten(0, 1)[..., None, None]
            head = self._generate(alone, None).view_as(head)
        return torch.cat([head, body], dim=1) if self.prefix else body

    def _generate(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x [B, D, N], or a map [B, D, H, W]; keep [B, 1, N], 0 = padding, of texts only."""
        x = self.first(x if keep is None else x * keep).relu()
        out: Tensor = self.second(x if keep is None else x * keep)
        return out


class FeatureDistiller(nn.Module):
    """All of the backbone → side direction: φ, f_mask, G and the two losses.

    Args:
        layouts: How b_0..b_L lie.
        features: How each s_l lies, by 1-based layer, ascending.
        protect_first: Never mask token 0 (the class token; text keeps its [CLS] in place).
        config: Mask ratio λ, bottleneck width d, sharing, split.
        imitate: Whether the shallow layers count; else they get no φ.
        generate: Whether the deep layers count; else they get no φ, no G and no f_mask.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        features: Mapping[int, Layout],
        *,
        protect_first: bool,
        config: DistillConfig,
        imitate: bool = True,
        generate: bool = True,
    ) -> None:
        super().__init__()
        layers = list(features)
        split = config.shallow_layers
        split = (len(layers) + 1) // 2 if split is None else min(split, len(layers))
        self.shallow: tuple[int, ...] = tuple(layers[:split]) if imitate else ()
        self.deep: tuple[int, ...] = tuple(layers[split:]) if generate else ()
        self.config = config
        self.features = dict(features)
        self.grids = {layer: layouts[layer].grid for layer in features}
        self.targets = {
            layer: replace(layouts[layer], grid=lies.grid) for layer, lies in features.items()
        }
        self.coarse = min((g for n in self.deep if (g := features[n].grid)), default=None)
        protects = config.mask_tokens == "patches"
        self.protected = max(layouts[-1].prefix, int(protect_first)) if protects else 0
        self.full = config.gen_conv == "full"
        self.phi = nn.ModuleDict(_once(self._phi, self._bottleneck, self.shallow + self.deep))
        if self.deep:
            self.gen = nn.ModuleDict(_once(self._gen, self._generator, self.deep))
            widths = dict.fromkeys(self._inside(layer).width for layer in self.deep)
            self.mask_token = nn.ParameterDict(
                {str(width): nn.Parameter(torch.randn(width) * 0.02) for width in widths}
            )

    def _d(self, layer: int) -> int:
        width = self.features[layer].width
        return self.config.bottleneck or (width // 4 if self.full else min(12, width // 2))

    def _bottleneck(self, layer: int) -> Bottleneck:
        return Bottleneck(self.features[layer].width, self._d(layer), self.targets[layer].width)

    def _inside(self, layer: int) -> Layout:
        """Return how the tokens lie that a deep layer's mask and G work on."""
        target = self.targets[layer]
        return replace(target, width=self._d(layer)) if self.full else target

    def _generator(self, layer: int) -> Generator:
        reads_prefix = self.config.mask_tokens == "all"
        return Generator(self._inside(layer), full=self.full, reads_prefix=reads_prefix)

    def _phi(self, layer: int) -> str:
        """Return the name of a layer's φ; one of equal widths is shared, if any is."""
        widths = f"shared {self.features[layer].width} {self.targets[layer].width}"
        return widths if self.config.share_phi else str(layer)

    def _gen(self, layer: int) -> str:
        """Return the name of a layer's G; one of an equal grid and width is shared, if any is."""
        inside = self._inside(layer)
        return f"shared {inside.width} {inside.grid}" if self.config.share_gen else str(layer)

    def mask_tokens(self, taps: Sequence[Tensor]) -> int:
        """Return the tokens of the mask: those of the coarsest grid, or N."""
        if self.coarse is None:
            return taps[0].shape[1]
        return self.features[self.deep[0]].prefix + prod(self.coarse)

    def draw_mask(self, keys: NDArray[np.int64], tokens: int, seed: int, step: int) -> Tensor:
        """Draw m of Eq. 5: [B, N], 1 = hidden.

        Every example has its own stream, keyed by (seed, step, position in the data set), so the
        draw depends neither on the number of processes nor on padding.

        Args:
            keys: Position of each example in the training data [B].
            tokens: Those of `mask_tokens`.
            seed: The run's seed.
            step: The optimiser step.
        """
        if self.config.mask_level == "batch":
            keys = np.full_like(keys, -1)
        rows = [
            np.random.Generator(np.random.Philox(key=[seed, (step << 32) + int(key) + 1])).random(
                tokens
            )
            for key in keys
        ]
        hidden = np.stack(rows) < self.config.mask_ratio
        hidden[:, : self.protected] = False
        return torch.from_numpy(hidden.astype(np.float32))

    def _spread(self, layer: int, hidden: Tensor) -> Tensor:
        """Repeat the mask over the cells of a layer's finer grid: [B, n] → [B, N]."""
        grid = self.features[layer].grid
        if grid == self.coarse or grid is None or self.coarse is None:
            return hidden
        shown = hidden.unflatten(1, self.coarse).unsqueeze(1)
        return F.interpolate(shown, size=grid, mode="nearest").flatten(1)

    def student(self, layer: int, feature: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return φ_l(s_l) for a shallow layer, G_l(s̄_l) for a deep one: [B, N, D_B]."""
        phi = self.phi[self._phi(layer)]
        assert isinstance(phi, Bottleneck)
        if layer in self.shallow:
            return phi(feature)
        shown = phi.down(feature) if self.full else phi(feature)
        token = self.mask_token[str(shown.shape[-1])].to(shown.dtype)
        masked = torch.where(self._spread(layer, hidden).unsqueeze(-1).bool(), token, shown)
        generated: Tensor = self.gen[self._gen(layer)](masked, mask)
        return phi.up(generated) if self.full else generated

    def target(self, layer: int, tap: Tensor) -> Tensor:
        """Return b_l [B, N, D_B] as its student sees it: the mean of each cell where that is coarser."""
        grid, coarse = self.grids[layer], self.features[layer].grid
        if grid == coarse or grid is None or coarse is None:
            return tap
        return cells(tap, grid, coarse).mean(dim=2)

    def weight(self, layer: int, tap: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return the tokens that count in a layer's loss [B, N] (and the means, if asked for)."""
        counted = torch.ones(tap.shape[:2], device=tap.device) if mask is None else mask.float()
        if layer in self.deep:
            counted = counted * self._spread(layer, hidden)
        if self.config.feature_mean:
            real = counted.sum(dim=1, keepdim=True).clamp_min(1)
            counted = counted / (real * tap.shape[-1])
        return counted

    def layer_loss(
        self, layer: int, feature: Tensor, tap: Tensor, hidden: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Σ over batch, tokens and channels of one layer's squared distance to b_l."""
        student, target = self.student(layer, feature, hidden, mask), self.target(layer, tap)
        return weighted_distance(student, target, self.weight(layer, target, hidden, mask))

    def forward(
        self,
        features: Mapping[int, Tensor],
        taps: Sequence[Tensor],
        hidden: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (Σ_shallow L_sha, Σ_deep L_deep), summed over the batch.

        Args:
            features: s_l by layer.
            taps: b_0..b_L; only b_l of layers with an s_l are read, and they are detached.
            hidden: m [B, N].
            mask: [B, N], 1 = real token; None when nothing is padded.
        """
        sums = []
        for layers in (self.shallow, self.deep):
            total = taps[0].new_zeros((), dtype=torch.float32)
            for layer in layers:
                total = total + checkpoint(
                    self.layer_loss,
                    layer,
                    features[layer],
                    taps[layer].detach(),
                    hidden,
                    mask,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            sums.append(total)
        return sums[0], sums[1]


def _once(
    name: Callable[[int], str], make: Callable[[int], nn.Module], layers: Sequence[int]
) -> dict[str, nn.Module]:
    """Make a module per name, in the order of the layers."""
    made: dict[str, nn.Module] = {}
    for layer in layers:
        if name(layer) not in made:
            made[name(layer)] = make(layer)
    return made


def weighted_distance(student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Σ weight (student − target)²: [B, N, D], [B, N, D], [B, N] → a scalar in float32.

    Only the student takes a gradient.
    """
    distance: Tensor = _Distance.apply(student, target, weight)
    return distance


class _Distance(torch.autograd.Function):
    """The difference is made in either pass and kept in none: in float32 it would be the peak."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(student, target, weight)
        return (_difference(student, target).square_().sum(dim=-1) * weight).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        student, target, weight = ctx.saved_tensors
        twice = (2 * grads[0] * weight).unsqueeze(-1)
        return _difference(student, target).mul_(twice).to(student.dtype), None, None


def _difference(student: Tensor, target: Tensor) -> Tensor:
    return student.to(torch.float32, copy=True).sub_(target)
