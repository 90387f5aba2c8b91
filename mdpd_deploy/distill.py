"""MDPD's feature distillation, backbone → side network (paper Eq. 1, 2, 4-7).

Shallow layers are imitated directly, deep layers are generated behind a mask:

    Eq. 1    φ_l(s) = (s M_down) M_up                      [B, N, D_S] → [B, N, D_B], both biases
    Eq. 4    L_sha  = Σ_tokens Σ_channels (b_l − φ_l(s_l))²
    Eq. 5-7  L_deep = Σ_tokens m Σ_channels (b_l − G_l(s̄_l))²,  s̄ = f_mask where m, else φ_l(s_l)

Readings that the paper leaves open, each a default here: targets b_l are detached;
one mask per example, drawn anew each step and shared by all deep layers (`distill.mask_level`);
it hides tokens after the bottleneck, never class, register or padding tokens; G is depth-wise
(3×3 on the patch grid, k = 3 on text) because a full 3×3 at width D_B would cost more than the
whole reported budget; the class token of images skips G; padding is left out of every sum and
zeroed before each convolution; sums over tokens and channels, mean over the batch, which makes
the paper's 4e-5 commensurate with a cross-entropy (`distill.feature_mean` takes means instead);
layers with an s_l are split in two halves, the first one rounded up. Initial values: PyTorch's
defaults, f_mask ~ N(0, 0.02²).

Each layer's term is recomputed in the backward pass, otherwise its [B, N, D_B] tensors of all
layers together would be the peak of the training step.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
    """G: depth-wise conv 3 → ReLU → depth-wise conv 3, on the patch grid or along the text.

    Args:
        width: D_B.
        grid: (rows, columns) of the patches; None for text.
        prefix: Class and register tokens in front, which pass unchanged.
    """

    def __init__(self, width: int, grid: tuple[int, int] | None, prefix: int) -> None:
        super().__init__()
        conv = nn.Conv2d if grid else nn.Conv1d
        self.first = conv(width, width, 3, padding=1, groups=width)
        self.second = conv(width, width, 3, padding=1, groups=width)
        self.grid = grid
        self.prefix = prefix

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, D_B], mask [B, N] (1 = real token) → [B, N, D_B]."""
        head, body = x[:, : self.prefix], x[:, self.prefix :].transpose(1, 2)
        keep = None if mask is None else mask[:, self.prefix :].to(x.dtype).unsqueeze(1)
        shape = body.shape
        body = self._conv(self.first, body, keep).relu()
        body = self._conv(self.second, body, keep).reshape(shape).transpose(1, 2)
        return torch.cat([head, body], dim=1) if self.prefix else body

    def _conv(self, conv: nn.Module, x: Tensor, keep: Tensor | None) -> Tensor:
        if keep is not None:
            x = x * keep
        batch, width = x.shape[:2]
        out: Tensor = conv(x.reshape(batch, width, *self.grid) if self.grid else x)
        return out.reshape(batch, width, -1)


class FeatureDistiller(nn.Module):
    """All of the backbone → side direction: φ, f_mask, G and the two losses.

    Args:
        width: D_B.
        side_width: D_S.
        layers: The 1-based layers that have an s_l.
        grid: Patch grid, None for text.
        prefix: Class and register tokens in front of the patches.
        protect_first: Never mask token 0 (the class token; text keeps its [CLS] in place).
        config: Mask ratio λ, bottleneck width d, sharing, split.
        imitate: Whether the shallow layers count; else they get no φ.
        generate: Whether the deep layers count; else they get no φ, no G and no f_mask.
    """

    def __init__(
        self,
        *,
        width: int,
        side_width: int,
        layers: Sequence[int],
        grid: tuple[int, int] | None,
        prefix: int,
        protect_first: bool,
        config: DistillConfig,
        imitate: bool = True,
        generate: bool = True,
    ) -> None:
        super().__init__()
        split = config.shallow_layers
        split = (len(layers) + 1) // 2 if split is None else min(split, len(layers))
        self.shallow = tuple(layers[:split]) if imitate else ()
        self.deep = tuple(layers[split:]) if generate else ()
        layers = self.shallow + self.deep
        self.config = config
        self.protected = max(prefix, int(protect_first))
        d = config.bottleneck or min(12, side_width // 2)
        phi_names = ["shared"] if config.share_phi else [str(layer) for layer in layers]
        phi_names = phi_names if layers else []
        gen_names = ["shared"] if config.share_gen else [str(layer) for layer in self.deep]
        self.phi = nn.ModuleDict({name: Bottleneck(side_width, d, width) for name in phi_names})
        if self.deep:
            self.gen = nn.ModuleDict({name: Generator(width, grid, prefix) for name in gen_names})
            self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def draw_mask(self, keys: NDArray[np.int64], tokens: int, seed: int, step: int) -> Tensor:
        """Draw m of Eq. 5: [B, N], 1 = hidden.

        Every example has its own stream, keyed by (seed, step, position in the data set), so the
        draw depends neither on the number of processes nor on padding.

        Args:
            keys: Position of each example in the training data [B].
            tokens: N.
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

    def student(self, layer: int, feature: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return φ_l(s_l) for a shallow layer, G_l(s̄_l) for a deep one: [B, N, D_B]."""
        projected = self.phi["shared" if self.config.share_phi else str(layer)](feature)
        if layer in self.shallow:
            return projected
        masked = torch.where(
            hidden.unsqueeze(-1).bool(), self.mask_token.to(projected.dtype), projected
        )
        return self.gen["shared" if self.config.share_gen else str(layer)](masked, mask)

    def weight(self, layer: int, tap: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return the tokens that count in a layer's loss [B, N] (and the means, if asked for)."""
        counted = torch.ones(tap.shape[:2], device=tap.device) if mask is None else mask.float()
        if layer in self.deep:
            counted = counted * hidden
        if self.config.feature_mean:
            real = counted.sum(dim=1, keepdim=True).clamp_min(1)
            counted = counted / (real * tap.shape[-1])
        return counted

    def layer_loss(
        self, layer: int, feature: Tensor, tap: Tensor, hidden: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Σ over batch, tokens and channels of one layer's squared distance to b_l."""
        student = self.student(layer, feature, hidden, mask)
        return weighted_distance(student, tap, self.weight(layer, tap, hidden, mask))

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


def weighted_distance(student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Σ weight (student − target)²: [B, N, D], [B, N, D], [B, N] → a scalar in float32."""
    distance = F.mse_loss(student.float(), target.float(), reduction="none")
    return (distance.sum(dim=-1) * weight).sum()
