"""DTL: a compact side network that gathers low-rank readings and adds them to the late blocks.

Source: "DTL: Disentangled Transfer Learning for Visual Recognition" (AAAI 2024) and its released
code for v1; the journal extension for v2 and v2-LS, which have no code. Layers count from 1:

    h_{i+1} = h_i + z_i w_i,  w_i = a_i c_i of rank d', c_i = 0 at the start
    z_{i+1} = b_i(z_i)                       for i < M: the plain backbone, never in the graph
    z_{i+1} = b_i(z_i) + F_i(h_{i+1})        for i ≥ M

    v1   F_i(h) = g(θ(h)): one depth-wise convolution g for all blocks, θ(x) = x σ(100 x)
    v2   F_i(h) = θ(g_i(h)) w'_i + h on some blocks only; w_i on some blocks only
    LS   as v2 with one g and w' for all; blocks that read the same h get a scale and a shift each

Between the stages of a hierarchical network the width changes, and h with it: v1 begins again at 0,
in v2 and LS a bridge carries it on, a 2×2 convolution of stride 2 in groups of 4 channels. Hence v1
reads only the blocks of stages in which others are adapted behind them (Swin-B: 5 to 24), and the
pattern of v2 is that of every stage for itself (Swin-B: 2, 4, 5, 9, 13, 17, 22, 24 are read; 13,
15, 17, 19, 22, 24 adapted; both as the paper lists them). There is one g per stage.

At the start h = 0 and the logits are the frozen backbone's. Read-out is the deployed model's own,
so that this holds exactly; the released code averages the patch tokens of a ViT before the final norm
(`side.readout=released`). Prefix tokens
skip g; texts, which the papers leave out, take a 1-D convolution along the words.

The backbone's stochastic depth (`backbone.drop_path`) is on while training, as in the released
code: a block that is run on z draws anew what it leaves out, and the backbone's own pass stops
before it, so that each block draws once for an answer.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides.base import SIDES, FrozenBlocks, SideNetwork, SideOutput, SideShape

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
        layout: Width, grid and prefix tokens, which pass unchanged.
        kernel: k; an even one pads less before than behind.
    """

    def __init__(self, layout: Layout, kernel: int) -> None:
        super().__init__()
        width, self.grid, self.prefix = layout.width, layout.grid, layout.prefix
        conv = nn.Conv2d if self.grid else nn.Conv1d
        self.conv = conv(width, width, kernel, padding="same", groups=width, bias=False)

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


class Bridge(nn.Module):
    """Brings h [B, N, C] to the next stage: a grouped, strided convolution without bias.

    Between grids that do not halve, kernel and stride are their ratio; a grid that was padded to
    be halved is padded here too.
    """

    def __init__(self, before: Layout, after: Layout) -> None:
        super().__init__()
        assert before.grid is not None and after.grid is not None
        self.grid = before.grid
        pairs = list(zip(before.grid, after.grid, strict=True))
        stride = max(round(a / b) for a, b in pairs)
        (rows, columns) = (max(0, stride * b - a) for a, b in pairs)
        self.padding = (0, columns, 0, rows)
        groups = gcd(max(before.width // 4, 1), before.width, after.width)
        self.conv = nn.Conv2d(
            before.width, after.width, stride, stride=stride, groups=groups, bias=False
        )

    def forward(self, h: Tensor) -> Tensor:
        shown = nn.functional.pad(h.transpose(1, 2).unflatten(2, self.grid), self.padding)
        out: Tensor = self.conv(shown)
        return out.flatten(2).transpose(1, 2)


class DTL(SideNetwork):
    """Taps b_0..b_M → own run of blocks M+1..L with h added → side output [B, N, D].

    Args:
        shape: The backbone.
        reads: Blocks i whose input feeds h through a w_i, ascending.
        adds: {block i: index of its module in `fusions`}; the first block is M.
        fusions: F_i by index.
        rank: d'.
        affine: Blocks whose F_i is scaled and shifted (LS).
        bridged: Carry h from stage to stage (v2) instead of beginning again at 0.
    """

    has_features = False  # h is the same over several blocks, but in v1
    distils_features = False

    def __init__(
        self,
        shape: SideShape,
        reads: Sequence[int],
        adds: Mapping[int, int],
        fusions: Sequence[nn.Module],
        rank: int,
        *,
        affine: Sequence[int] = (),
        bridged: bool = False,
    ) -> None:
        super().__init__()
        self.depth = shape.depth
        self.last_tap = min(adds)
        self.width = shape.width
        self.feature_layers = tuple(reads) if self.has_features else ()
        self.reads = nn.ModuleDict(
            {str(index): LowRank(shape.entry(index - 1).width, rank) for index in reads}
        )
        self.fusions = nn.ModuleList(fusions)
        self.adds = adds
        self.affine = nn.ModuleDict(
            {str(index): ScaleShift(shape.layouts[index].width) for index in affine}
        )
        self.turns = turns(shape)
        last = max(adds) if bridged else 0
        self.bridges = nn.ModuleDict(
            {
                name: Bridge(turn.before, turn.after)
                for name, turn in self.turns.items()
                if reads[0] < turn.first_reader and turn.layer <= last
            }
        )

    def feature_layout(self, layer: int, layouts: Sequence[Layout]) -> Layout:
        """Return how h lies, which is as the tap."""
        return layouts[layer]

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: FrozenBlocks
    ) -> SideOutput:
        x = taps[0]
        h = zeros_like(x)
        states = {}
        for layer in range(1, self.depth + 1):
            if f"before {layer}" in self.turns:
                x = run_block.enter(layer - 1, x)
                h = self._turn(f"before {layer}", h, x)
            h = self._read(layer, x, h)
            states[layer] = h
            x = taps[layer] if layer <= self.last_tap else run_block(layer - 1, x)
            h = self._turn(f"in {layer}", h, x)
            x = self._add(layer, x, h, mask)
        return SideOutput(x, {layer: states[layer] for layer in self.feature_layers})

    def _turn(self, name: str, h: Tensor, x: Tensor) -> Tensor:
        """Bring h to the layout of x where it changes."""
        if name not in self.turns:
            return h
        return self.bridges[name](h) if name in self.bridges else zeros_like(x)

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
    """DTL as released ("DTL+"): every block is read, blocks M..L are adapted, where it has effect."""

    options = ("rank", "kernel", "dtl_first", "readout")
    has_features = True

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "DTLv1":
        late = range(first_adapted(shape, config), shape.depth + 1)
        met = [(i, j) for i in range(1, shape.depth + 1) for j in late if reaches(shape, i, j)]
        if not met:
            raise UserError(
                "side.name=dtlv1 begins again in every stage, and no stage here has a second block "
                f"behind block {late[0]}; use dtlv2, or a smaller side.dtl_first."
            )
        reads, adds = (sorted(set(blocks)) for blocks in zip(*met, strict=True))
        kinds, at = by_layout(shape, adds)
        fusions = [Plain(token_conv(kind, shape, config), Swish()) for kind in kinds]
        return cls(shape, reads, at, fusions, config.rank)


@SIDES.register("dtlv2")
class DTLv2(DTL):
    """Few readings, few adapted blocks, a fusion of its own for each."""

    options = ("rank", "kernel", "dtl_first", "dtl_reads", "dtl_adds", "readout")

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "DTLv2":
        reads, adds = pattern(shape, config)
        fusions = [fusion(shape.layouts[block], shape, config) for block in adds]
        at = {block: index for index, block in enumerate(adds)}
        return cls(shape, reads, at, fusions, config.rank, bridged=True)


@SIDES.register("dtlv2-ls")
class DTLv2LS(DTLv2):
    """One fusion for all adapted blocks of a stage, scaled and shifted where h is the same."""

    @classmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "DTLv2LS":
        reads, adds = pattern(shape, config)
        kinds, at = by_layout(shape, adds)
        fusions = [fusion(kind, shape, config) for kind in kinds]
        affine = shared_state(shape, reads, adds)
        return cls(shape, reads, at, fusions, config.rank, affine=affine, bridged=True)


@dataclass(frozen=True)
class Turn:
    """A place where the layout of the states changes, and h must follow.

    Attributes:
        layer: The block that it lies before or in.
        before, after: The layouts.
        first_reader: The first block whose reading comes behind it.
    """

    layer: int
    before: Layout
    after: Layout
    first_reader: int


def turns(shape: SideShape) -> dict[str, Turn]:
    """Return the places by name: `before 5` for a merge before block 5, `in 5` for the block."""
    found = {}
    for layer in range(1, shape.depth + 1):
        before, entry, after = (
            shape.layouts[layer - 1],
            shape.entry(layer - 1),
            shape.layouts[layer],
        )
        if before != entry:
            found[f"before {layer}"] = Turn(layer, before, entry, layer)
        if entry != after:
            found[f"in {layer}"] = Turn(layer, entry, after, layer + 1)
    return found


def zeros_like(x: Tensor) -> Tensor:
    """Return zeros of the shape of x that take no memory."""
    return x.new_zeros(()).expand_as(x)


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
    adds = sorted(set(config.dtl_adds or default_adds(shape, first_adapted(shape, config))))
    reads = sorted(set(config.dtl_reads or default_reads(shape, adds[-1])))
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


def default_reads(shape: SideShape, last: int) -> list[int]:
    """Return the blocks of v2 whose input is read: of every stage every fourth, and its last.

    None is read right before a stage's last one, as in the paper's list for Swin; a plain
    transformer of 6 or 10 blocks keeps it.
    """
    found = [(a, min(b, last)) for a, b in spans(shape) if a <= last]
    spare = 1 if len(found) > 1 else -1
    return sorted({block for a, b in found for block in (*range(a, b - spare, 4), b)})


def default_adds(shape: SideShape, first: int) -> list[int]:
    """Return the blocks of v2 whose output is adapted: from M every second of a stage, and its last."""
    found = [(max(a, first), b) for a, b in spans(shape) if b >= first]
    return sorted({block for a, b in found for block in (*range(a, b - 1, 2), b)})


def spans(shape: SideShape) -> list[tuple[int, int]]:
    """Return the first and the last block of every stage: of every run of equal outputs."""
    ends = [
        block
        for block in range(1, shape.depth + 1)
        if block == shape.depth or shape.layouts[block] != shape.layouts[block + 1]
    ]
    return list(zip([1, *(end + 1 for end in ends)], ends, strict=False))


def reaches(shape: SideShape, read: int, add: int) -> bool:
    """Tell whether what block `read` is read for is added behind block `add` in the same stage."""
    changes = turns(shape).values()
    return read <= add and not any(
        read < turn.first_reader and turn.layer <= add for turn in changes
    )


def shared_state(shape: SideShape, reads: Sequence[int], adds: Sequence[int]) -> list[int]:
    """Return the adapted blocks that read the same h as an adapted block before them (LS)."""
    return [
        block
        for before, block in pairwise(adds)
        if shape.layouts[before] == shape.layouts[block]
        and not any(before < read <= block for read in reads)
    ]


def by_layout(shape: SideShape, adds: Sequence[int]) -> tuple[list[Layout], dict[int, int]]:
    """Return the layouts of the adapted blocks, and for every block the place of its own."""
    kinds = list(dict.fromkeys(shape.layouts[block] for block in adds))
    return kinds, {block: kinds.index(shape.layouts[block]) for block in adds}


def token_conv(layout: Layout, shape: SideShape, config: SideConfig) -> TokenConv:
    """Return g: k = 5 on patches (the reported sizes need it), 3 along words."""
    return TokenConv(layout, config.kernel or (3 if shape.text else 5))


def fusion(layout: Layout, shape: SideShape, config: SideConfig) -> Fusion:
    return Fusion(token_conv(layout, shape, config), Swish(), config.rank, layout.width)
