"""The one interface of side networks: taps in, side features and the side output out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.backbones.wrap import Trace
from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry


class FrozenBlocks:
    """The blocks of a backbone with what they were called with in a trace.

    Args:
        backbone: Whose blocks they are.
        trace: Of the inputs at hand.
        blocked: Keep gradients from the norms.
    """

    def __init__(self, backbone: Backbone, trace: Trace, *, blocked: bool = False) -> None:
        self.backbone = backbone
        self.trace = trace
        self.blocked = blocked

    def __call__(self, index: int, x: Tensor, *, block: nn.Module | None = None) -> Tensor:
        """Run block `index` on what it reads [B, N, D], or a thinner copy in its place."""
        run = self.backbone.run_block
        x = x if block is not None else x.to(self.trace.taps[0].dtype)
        return run(self.trace, index, x, blocked=self.blocked, block=block)

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Return what block `index` reads, where x [B, N, D] is in the place of b_index.

        That is x, unless a merge of stages lies before the block.
        """
        x = x.to(self.trace.taps[0].dtype)
        return self.backbone.enter(self.trace, index, x, blocked=self.blocked)


Importance = Callable[[Tensor], Tensor]  # a weight → numbers ≥ 0 of its shape


@dataclass(frozen=True)
class SideShape:
    """What a side network must know of the backbone it sits beside.

    Attributes:
        layouts: How b_0..b_L lie.
        text: Whether tokens are words.
        entries: How what each block reads lies; empty where it is the tap before it.
        batch_norms: Whether the backbone's norms are batch norms.
        backbone: The backbone itself, for side networks made of thinner copies of its blocks.
    """

    layouts: tuple[Layout, ...]
    text: bool
    entries: tuple[Layout, ...] = ()
    batch_norms: bool = False
    backbone: Backbone | None = None

    @classmethod
    def of(cls, backbone: Backbone) -> "SideShape":
        """Describe a backbone."""
        kinds = nn.modules.batchnorm._BatchNorm
        return cls(
            backbone.layouts,
            backbone.takes == "text",
            backbone.entries,
            any(isinstance(module, kinds) for module in backbone.modules()),
            backbone,
        )

    @property
    def width(self) -> int:
        """D of the last tap."""
        return self.layouts[-1].width

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layouts) - 1

    def entry(self, index: int) -> Layout:
        """How what block `index` reads lies."""
        return (self.entries or self.layouts)[index]

    @property
    def stages(self) -> tuple[int, ...]:
        """The last tap on each grid; (L,) where all taps are alike."""
        after = (*self.layouts[1:], None)
        pairs = zip(self.layouts, after, strict=True)
        return tuple(i for i, (a, b) in enumerate(pairs) if b is None or a.grid != b.grid)

    @property
    def default_reduction(self) -> int:
        """r: 8 for text, 2 for vision."""
        return 8 if self.text else 2


@dataclass
class SideOutput:
    """What a side network returns.

    Attributes:
        tokens: The side output [B, N, D]; it goes where the backbone's last features would go.
        features: s_l by 1-based layer, as `feature_layout` says; only the layers that have one.
    """

    tokens: Tensor
    features: dict[int, Tensor]

    def last(self, depth: int) -> Tensor:
        """Return s_L: the feature of layer `depth`, or the output itself where it has none."""
        return self.features.get(depth, self.tokens)


class SideNetwork(nn.Module, ABC):
    """A trained network that reads detached backbone taps.

    Attributes:
        options: The options of `SideConfig` that it reads, beside its name.
        has_features: Whether it gives an s_l per layer, which MDPD teaches and pools.
        distils_features: Whether MDPD imitates and generates the backbone's features from s_l
            unless told otherwise.
        has_last: Whether a head can read s_L: the last feature, or the output where it has none.
        readout: What its head reads: tokens as the deployed model's are pooled ("model"), pooled
            before the final norm ("released"), or s_L ("feature").
        width: D_S.
        last_tap: The highest tap b_l that it reads; the backbone need not run past it.
        feature_layers: The layers l that have an s_l, ascending.
    """

    options: ClassVar[tuple[str, ...]] = ()
    has_features: ClassVar[bool] = True
    distils_features: ClassVar[bool] = True
    has_last: ClassVar[bool] = False
    readout: Literal["model", "released", "feature"] = "model"
    width: int
    last_tap: int
    feature_layers: tuple[int, ...]

    @classmethod
    @abstractmethod
    def build(cls, shape: SideShape, config: SideConfig) -> "SideNetwork":
        """Build it for a backbone, with fresh weights.

        Raises:
            UserError: If an option does not fit the backbone.
        """

    @abstractmethod
    def forward(
        self, taps: Sequence[Tensor], mask: Tensor | None, run_block: FrozenBlocks
    ) -> SideOutput:
        """Run the side network.

        Args:
            taps: b_0..b_{last_tap}, each [B, N, D], detached.
            mask: [B, N], 1 = real token; None when nothing is padded.
            run_block: Runs backbone blocks, for side networks whose graph contains late ones.
        """

    def feature_layout(self, layer: int, layouts: Sequence[Layout]) -> Layout:
        """Return how s_l lies: as b_l, in the side network's width."""
        return replace(layouts[layer], width=self.width)

    def last_layout(self, layouts: Sequence[Layout]) -> Layout:
        """Return how s_L lies: the last layer's own feature, or the output where it has none."""
        last = len(layouts) - 1
        own = last in self.feature_layers
        return self.feature_layout(last, layouts) if own else layouts[last]

    def pooled_width(self, backbone: Backbone) -> int:
        """Return the width of what its head reads."""
        feature = self.readout == "feature"
        return self.last_layout(backbone.layouts).width if feature else backbone.width

    def read_feature(self) -> None:
        """Let the head read s_L, and leave out what only the side output needs."""
        self.readout = "feature"

    def inherit(self, backbone: Backbone, importance: Importance) -> None:
        """Take first weights from the backbone; most side networks start from their own."""

    def kept_small(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Call a function without dropout; in training it keeps no tensor of its own.

        What it would keep is computed again in the backward pass.
        """
        if not (self.training and torch.is_grad_enabled()):
            return function(*inputs)
        result: Tensor = checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return result


SIDES: Registry[type[SideNetwork]] = Registry("side.name (--side)")


def ignored_options(name: str) -> list[str]:
    """Return the options of `SideConfig` that a side network never reads."""
    read = ("name", *SIDES.get_or_raise(name).options)
    return [option for option in SideConfig.model_fields if option not in read]


def check_options(config: SideConfig) -> None:
    """Refuse an option that the side network would ignore."""
    plain = SideConfig()
    for option in ignored_options(config.name):
        value = getattr(config, option)
        if value != getattr(plain, option):
            *most, last = sorted(name for name, side in SIDES.items() if option in side.options)
            names = f"{', '.join(most)} and {last}" if most else last
            raise UserError(
                f"side.{option}={value} is read by --side {names} only; "
                f"leave it out with --side {config.name}."
            )


def other_side(config: SideConfig, name: str) -> SideConfig:
    """Return the config of another side network at the same reduction."""
    ignored = ignored_options(name)
    kept = {k: v for k, v in config if k not in ignored}
    return SideConfig(**{**kept, "name": name})


def side_width(
    shape: SideShape, config: SideConfig, *, default: int | None = None, heads: int = 1
) -> int:
    """Return D_S = D / r.

    Args:
        shape: The backbone.
        config: `reduction` is r.
        default: r where the config names none; None takes the shape's.
        heads: What D_S must be a multiple of.

    Raises:
        UserError: When r does not fit, naming those that do.
    """
    width = shape.width
    reduction = config.reduction or default or shape.default_reduction
    valid = [
        r
        for r in range(1, width + 1)
        if width % r == 0 and width // r >= 8 and (width // r) % heads == 0
    ]
    if reduction not in valid:
        also = f" and a multiple of its {heads} heads" if heads > 1 else ""
        raise UserError(
            f"side.reduction={reduction} does not fit a backbone of width {width}: the side "
            f"width must be whole, at least 8{also}. Valid values: {', '.join(map(str, valid))}."
        )
    return width // reduction
