"""Hierarchical networks of timm: Swin, ConvNeXt, ResNet, EfficientNet and their like.

Their blocks work on maps, in stages: from one to the next the map shrinks and its channels grow,
in a merge between them (Swin, ConvNeXt) or within a stage's first block (the others). A merge is
run with the blocks, counts its norm with the block behind it, and gives no tap. The widths and
grids of the taps are found by running the shapes of one picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mdpd_deploy.backbones.base import Inputs, Layer, Layered, WithoutGrad
from mdpd_deploy.backbones.discover import is_norm, is_tuned
from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.backbones.vit import image_preprocess, image_size, random_pictures, switch_fused
from mdpd_deploy.backbones.wrap import Call, Forward, wrapped
from mdpd_deploy.errors import UserError

ATTENTION = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Declaration:
    """Where one class of timm keeps what we need.

    Attributes:
        blocks: Class names of its blocks.
        axes: How its maps lie.
        tail: What the model does behind its last block: a map → pooled features [B, D].
        norms: Paths of the norms in the tail; those that it has are tuned.
        stages: Paths of the stages, or of a list of them.
        inner: Path of the blocks in a stage; empty where the stage is a list of them.
        post_norm: Whether norms close the branches of a block.
    """

    blocks: tuple[str, ...]
    axes: Literal["BHWC", "BCHW"]
    tail: Callable[[Any, Tensor], Tensor]
    norms: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("stages",)
    inner: str = "blocks"
    post_norm: bool = False


SWIN = Declaration(
    blocks=("SwinTransformerBlock",),
    axes="BHWC",
    tail=lambda model, x: model.forward_head(model.norm(x)),
    norms=("norm",),
    stages=("layers",),
)
EFFICIENT = Declaration(
    blocks=(
        "ConvBnAct",
        "DepthwiseSeparableConv",
        "EdgeResidual",
        "InvertedResidual",
        "UniversalInvertedResidual",
    ),
    axes="BCHW",
    tail=lambda model, x: model.forward_head(model.bn2(model.conv_head(x))),
    norms=("bn2",),
    stages=("blocks",),
    inner="",
)
DECLARATIONS = {
    "SwinTransformer": SWIN,
    "SwinTransformerV2": replace(SWIN, blocks=("SwinTransformerV2Block",), post_norm=True),
    "ConvNeXt": Declaration(
        blocks=("ConvNeXtBlock",),
        axes="BCHW",
        tail=lambda model, x: model.forward_head(model.norm_pre(x)),
        norms=("norm_pre", "head.norm"),
    ),
    "ResNet": Declaration(
        blocks=("BasicBlock", "Bottleneck"),
        axes="BCHW",
        tail=lambda model, x: model.forward_head(x),
        stages=("layer1", "layer2", "layer3", "layer4"),
        inner="",
    ),
    "EfficientNet": EFFICIENT,
    "MobileNetV3": replace(
        EFFICIENT, tail=lambda model, x: model.forward_head(x), norms=("norm_head",)
    ),
}


class StagesBackbone(Layered):
    """A hierarchical timm model without its classifier; pooled as timm pools it.

    Args:
        model: As `timm.create_model(..., num_classes=0)` returns it, and `is_staged`.
        name: What the user called it, for messages.
    """

    family = "stages"
    input_names = ("pixel_values",)
    prefix_tokens = 0
    has_cls = False
    heads = 0
    pooling = "mean"

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.declaration = DECLARATIONS[type(model).__name__]
        self.preprocess = image_preprocess(model)
        for part in model.modules():
            if hasattr(part, "qkv_bias_separate"):  # else the map's weight is read past adapters
                attention: Any = part
                attention.qkv_bias_separate = True
        switch_fused(model, "eager")
        self._look()

    def _look(self) -> None:
        """Run the shapes of one picture and note the layout of every tap and entry."""
        seen: list[tuple[Layout, Layout]] = []

        def look(index: int, plain: Forward, call: Call) -> Any:
            out = call.of(plain, call.x)
            seen.append((self._layout(call.x), self._layout(out)))
            return out

        self.eval()
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        shapes = {name: tensor.to("meta") for name, tensor in tensors}
        picture = torch.empty(1, 3, *image_size(self.model), device="meta")
        with torch.no_grad(), wrapped(self.blocks(), look):
            features = functional_call(self.model, shapes, (picture,))
        self.width = features.shape[-1]
        self._entries = tuple(entry for entry, _ in seen)
        self._layouts = (self._entries[0], *(end for _, end in seen))
        self.grid = self._layouts[-1].grid

    def _layout(self, x: Tensor) -> Layout:
        axes = self.declaration.axes
        sizes = dict(zip(axes, x.shape, strict=True))
        return Layout(sizes["C"], (sizes["H"], sizes["W"]), axes=axes)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """How the maps of b_0..b_L lie."""
        return self._layouts

    @property
    def entries(self) -> tuple[Layout, ...]:
        """How the maps lie that each block reads."""
        return self._entries

    def blocks(self) -> Sequence[nn.Module]:
        """Return timm's blocks, stage by stage."""
        return list(_blocks(self.model).values())

    def merges(self) -> Mapping[int, nn.Module]:
        """Return the merges by the index of the block behind them."""
        first = ".blocks.0"
        found = {}
        for index, path in enumerate(_blocks(self.model)):
            stage: Any = self.model.get_submodule(path.removesuffix(first))
            if path.endswith(first) and not isinstance(stage.downsample, nn.Identity):
                found[index] = stage.downsample
        return found

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """Run timm's forward: [B, D]; pictures have no padding, so `mask` is always None."""
        dtype = next(self.model.parameters()).dtype
        out: Tensor = self.model(inputs["pixel_values"].to(dtype))
        return out

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the pooled features [B, D]."""
        return self.run_library(inputs, None)

    def finish(self, x: Tensor, mask: Tensor | None, *, blocked: bool = False) -> Tensor:
        """Return what the model makes of its last map: b_L [B, N, D_L] → [B, D]."""
        tail = _Tail(self.model, self.declaration.tail)
        out: Tensor = (WithoutGrad(tail) if blocked else tail)(self.layouts[-1].state(x))
        return out

    def final_norm(self) -> nn.Module | None:
        """Return the norm behind the last block, if there is one."""
        paths = {name for name, _ in self.model.named_modules()}
        found = [self.model.get_submodule(p) for p in self.declaration.norms if p in paths]
        return next((norm for norm in found if is_norm(norm)), None)

    def block_norms(self, index: int) -> dict[str, nn.Parameter]:
        """Return scale and shift of the norms of a block and of the merge before it."""
        names = {id(module): name for name, module in self.named_modules()}
        parts = [self.blocks()[index], self.merges().get(index)]
        return {
            f"{names[id(module)]}.{key}": parameter
            for part in reversed(parts)
            for name, module in (part.named_modules() if part is not None else ())
            if is_tuned(name, module)
            for key, parameter in module.named_parameters(recurse=False)
        }

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
        return random_pictures(batch, image_size(self.model), next(self.model.parameters()).device)

    def layers(self, index: int) -> tuple[Layer, ...]:
        """Return the maps of a windowed block; blocks of convolutions have none."""
        paths = {name for name, _ in self.blocks()[index].named_modules()}
        if not paths.issuperset(ATTENTION):
            raise UserError(
                f"adapters of peft need the linear maps of an attention, and {self.name} is made of "
                "convolutions: use --method norms, bitfit, full, mdpd or side."
            )
        qkv, proj, fc1, fc2 = (Layer((path,)) for path in ATTENTION)
        qkv = Layer(qkv.paths, stacked=3)
        norm1, norm2 = (Layer((path,), linear=False) for path in ("norm1", "norm2"))
        if self.declaration.post_norm:
            return (qkv, proj, norm1, fc1, fc2, norm2)
        return (norm1, qkv, proj, norm2, fc1, fc2)

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Change nothing: in windows of a few tokens attention is spelled out in training too.

        Fused, it keeps its output and a mask of its own: a tenth more memory (Swin-B, batch 32).
        """


class _Tail(nn.Module):
    """A model from its last map on."""

    def __init__(self, model: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.run = partial(run, model)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def is_staged(model: nn.Module) -> bool:
    """Tell whether a timm model is one of `DECLARATIONS`, with no other blocks than those."""
    declared = DECLARATIONS.get(type(model).__name__)
    if declared is None or not type(model).__module__.startswith("timm."):
        return False
    kinds = {type(block).__name__ for block in _blocks(model).values()}
    return bool(kinds) and kinds.issubset(declared.blocks)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by name, in the order in which they run."""
    declared = DECLARATIONS[type(model).__name__]
    found: dict[str, nn.Module] = {}
    for path in declared.stages:
        listed = model.get_submodule(path)
        stages = [path] if len(declared.stages) > 1 else list(_children(path, listed))
        for stage in stages:
            inner = f"{stage}.{declared.inner}" if declared.inner else stage
            found |= _children(inner, model.get_submodule(inner))
    return found


def _children(path: str, module: nn.Module) -> dict[str, nn.Module]:
    return {f"{path}.{name}": child for name, child in module.named_children()}
