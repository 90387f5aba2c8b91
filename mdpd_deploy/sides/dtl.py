"""DTL: a compact side network that gathers low-rank readings and adds them to the late blocks.

Source: "DTL: Disentangled Transfer Learning for Visual Recognition" (AAAI 2024) and its released
code for v1; the journal extension for v2 and v2-LS, which have no code. Layers count from 1:

    h_{i+1} = h_i + z_i w_i,  w_i = a_i c_i of rank d', c_i = 0 at the start
    z_{i+1} = b_i(z_i)                       for i < M: the plain backbone, never in the graph
    z_{i+1} = b_i(z_i) + F_i(h_{i+1})        for i ≥ M

    v1   F_i(h) = g(θ(h)): one depth-wise convolution g for all blocks, θ(x) = x σ(100 x)
    v2   F_i(h) = θ(g_i(h)) w'_i + h on some blocks only; w_i on some blocks only
    LS   as v2 with one g and w' for all; blocks that read the same h get a scale and a shift each

At the start h = 0 and the logits are the frozen backbone's. Read-out is the deployed model's own,
so that this holds exactly; the released code averages before the final norm. Prefix tokens
skip g; texts, which the papers leave out, take a 1-D convolution along the words.

The pattern of v2 on plain transformers is not reported, and no literal one gives the sizes reported
for ViT-B (v2 0.07 M, LS 0.04 M). The default follows the one for Swin's third stage: readings at
1, 5, 9, 12 and fusions at 7, 9, 12 of 12 blocks, 0.079 and 0.035 M. No two of these fusions read
the same h, so that LS has no scale or shift there. `side.kernel` (k), `side.dtl_reads` and
`side.dtl_adds` replace it; k, readings, fusions and scaled fusions that give both reported sizes:

    k = 3    7, 5, 3-4    8, 5, 1-4    9, 4, 0-2    10, 4, 0
    k = 4    7, 3, 2      8, 3, 0-2    9, 3, 0-1

Two of them as options are in docs/guide.md.

Under MDPD s_l is h_{l+1}, the state that is added to block l's output. Not h_l: h_1 = 0
would have nothing to teach, and what block l is read for would be missing from its own feature.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides.base import SIDES, RunBlock, SideNetwork, SideOutput, SideShape

BETA = 100.0


class LowRank(nn.Module):
    """x a c: [.., D] → [.., d'] → [.., D], without biases; zero at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, rank, bias=False)
        self.c = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.c.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.a(x))
        return out


class Swish(nn.Module):
    """θ(x) = x σ(βx); nearly a ReLU at β = 100."""

    def __init__(self, beta: float = BETA) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class TokenConv(nn.Module):
    """A depth-wise convolution over the patch grid, or along the words; no bias, same size.

    Args:
        width: D.
        kernel: k; an even one pads less before than behind.
        grid: (rows, columns) of the patches; None for text.
        prefix: Class and register tokens in front, which pass unchanged.
    """

    def __init__(self, width: int, kernel: int, grid: tuple[int, int] | None, prefix: int) -> None:
        super().__init__()
        conv = nn.Conv2d if grid else nn.Conv1d
        self.conv = conv(width, width, kernel, padding="same", groups=width, bias=False)
        self.grid = grid
        self.prefix = prefix

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, D], mask [B, N] (1 = real token) → [B, N, D]."""
        head, body = x[:, : self.prefix], x[:, self.prefix :]
        if mask is not None:
            body = body * mask[:, self.prefix :].to(body.dtype).unsqueeze(-1)
        body = body.transpose(1, 2)
        shape = body.shape
        grid: Tensor = self.conv(body.unflatten(2, self.grid) if self.grid else body)
        body = grid.reshape(shape).transpose(1, 2)
        return torch.cat([head, body], dim=1) if self.prefix else body


class Plain(nn.Module):
    """v1: g(θ(h))."""

    def __init__(self, conv: TokenConv, theta: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.theta = theta

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.conv(self.theta(h), mask)
        return out


class Fusion(nn.Module):
    """v2: G(h) = θ(g(h)) w' + h; prefix tokens skip g, not the rest."""

    def __init__(self, conv: TokenConv, theta: nn.Module, rank: int, width: int) -> None:
        super().__init__()
        self.conv = conv
        self.theta = theta
        self.map = LowRank(width, rank)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.map(self.theta(self.conv(h, mask))) + h
        return out


class ScaleShift(nn.Module):
    """LS: x ⊙ γ + β, the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class DTL(SideNetwork):
    """Taps b_0..b_M → own run of blocks M+1..L with h added → side output [B, N, D].

    Args:
        width: D.
        depth: L.
        first: M, the first block whose output is adapted.
        reads: Blocks i whose input feeds h through a w_i.
        adds: {block i: index of its module in `fusions`}, for i ≥ M.
        fusions: F_i by index.
        rank: d'.
        affine: Blocks whose F_i is scaled and shifted (LS).
    """

    has_features = False  # h is the same over several blocks, but in v1
    distils_features = False

    def __init__(
        self,
        width: int,
        depth: int,
        first: int,
        reads: Sequence[int],
        adds: dict[int, int],
        fusions: Sequence[nn.Module],
        rank: int,
        *,
        affine: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.width = width
        self.depth = depth
        self.last_tap = first
        self.feature_layers = tuple(range(1, depth + 1)) if self.has_features else ()
        self.reads = nn.ModuleDict({str(index): LowRank(width, rank) for index in reads})
        self.fusions = nn.ModuleList(fusions)
        self.adds = adds
        self.affine = nn.ModuleDict({str(index): ScaleShift(width) for index in affine})

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: RunBlock
    ) -> SideOutput:
        h = torch.zeros_like(taps[0])
        states = {}
        for layer in range(1, self.last_tap + 1):
            states[layer] = h = self._read(layer, taps[layer - 1], h)
        x = self._add(self.last_tap, taps[self.last_tap], h, mask)
        for layer in range(self.last_tap + 1, self.depth + 1):
            states[layer] = h = self._read(layer, x, h)
            x = self._add(layer, run_block(layer - 1, x), h, mask)
        return SideOutput(x, {layer: states[layer] for layer in self.feature_layers})

    def _read(self, layer: int, x: Tensor, h: Tensor) -> Tensor:
        name = str(layer)
        return h + self.reads[name](x) if name in self.reads else h

    def _add(self, layer: int, x: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
        if layer not in self.adds:
            return x
        name = str(layer)
        out = self.fusions[self.adds[layer]](h, mask)
        return x + (self.affine[name](out) if name in self.affine else out)


@SIDES.register("dtlv1")
class DTLv1(DTL):
    """DTL as released ("DTL+"): every block is read, blocks M..L are adapted."""

    options = ("rank", "kernel", "dtl_first")
    has_features = True

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "DTLv1":
        first = first_adapted(shape, config)
        layers = list(range(1, shape.depth + 1))
        return cls(
            shape.width,
            shape.depth,
            first,
            layers,
            dict.fromkeys(layers[first - 1 :], 0),
            [Plain(token_conv(shape, config), Swish())],
            config.rank,
        )


@SIDES.register("dtlv2")
class DTLv2(DTL):
    """Few readings, few adapted blocks, a fusion of its own for each."""

    options = ("rank", "kernel", "dtl_first", "dtl_reads", "dtl_adds")

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "DTLv2":
        reads, adds = pattern(shape, config)
        fusions = [fusion(shape, config) for _ in adds]
        at = {block: index for index, block in enumerate(adds)}
        return cls(shape.width, shape.depth, adds[0], reads, at, fusions, config.rank)


@SIDES.register("dtlv2-ls")
class DTLv2LS(DTLv2):
    """One fusion for all adapted blocks, scaled and shifted where h is the same."""

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "DTLv2LS":
        reads, adds = pattern(shape, config)
        return cls(
            shape.width,
            shape.depth,
            adds[0],
            reads,
            dict.fromkeys(adds, 0),
            [fusion(shape, config)],
            config.rank,
            affine=shared_state(reads, adds),
        )


def first_adapted(shape: SideShape, config: SideConfig) -> int:
    """Return M: `side.dtl_first`, or L//2 + 1."""
    first = config.dtl_first or shape.depth // 2 + 1
    if first > shape.depth:
        raise UserError(
            f"side.dtl_first={first} does not fit a backbone of {shape.depth} blocks: "
            f"give 1 to {shape.depth}."
        )
    return first


def pattern(shape: SideShape, config: SideConfig) -> tuple[list[int], list[int]]:
    """Return the blocks that are read, and those that are adapted; the first of these is M."""
    if config.dtl_first and config.dtl_adds:
        raise UserError(
            f"side.dtl_first={config.dtl_first} does nothing beside side.dtl_adds, whose first "
            f"block is M: leave one of them out."
        )
    adds = sorted(set(config.dtl_adds or default_adds(first_adapted(shape, config), shape.depth)))
    reads = sorted(set(config.dtl_reads or default_reads(adds[-1])))
    for name, blocks in (("dtl_reads", reads), ("dtl_adds", adds)):
        if blocks[0] < 1 or blocks[-1] > shape.depth:
            raise UserError(
                f"side.{name}={','.join(map(str, blocks))} does not fit: blocks are numbered "
                f"1 to {shape.depth} here."
            )
    if reads[-1] > adds[-1]:
        raise UserError(
            f"side.dtl_reads: what block {reads[-1]} is read for reaches no output, the last block "
            f"of side.dtl_adds being {adds[-1]}; read none behind it."
        )
    return reads, adds


def default_reads(last: int) -> list[int]:
    """Return the blocks of v2 whose input is read: every fourth up to the last fusion's, and it."""
    return sorted({*range(1, last + 1, 4), last})


def default_adds(first: int, depth: int) -> list[int]:
    """Return the blocks of v2 whose output is adapted: every second from M, and the last."""
    return sorted({*range(first, depth - 1, 2), depth})


def shared_state(reads: Sequence[int], adds: Sequence[int]) -> list[int]:
    """Return the adapted blocks that read the same h as an adapted block before them (LS)."""
    return [
        block
        for before, block in pairwise(adds)
        if not any(before < read <= block for read in reads)
    ]


def token_conv(shape: SideShape, config: SideConfig) -> TokenConv:
    """Return g: k = 5 on patches (the reported sizes need it), 3 along words."""
    kernel = config.kernel or (3 if shape.text else 5)
    return TokenConv(shape.width, kernel, shape.grid, shape.prefix)


def fusion(shape: SideShape, config: SideConfig) -> Fusion:
    return Fusion(token_conv(shape, config), Swish(), config.rank, shape.width)
