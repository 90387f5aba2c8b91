"""Plain vision transformers of timm: ViT, DeiT, DINOv2, DINOv3, EVA-02, BEiT, SigLIP and their like.

Plain means: one sequence of tokens, every block of a class in `declared.TIMM`, any number of prefix
tokens (class, distillation, registers), LayerScale or not. The pretrained final norm is kept where
the weights have it: before the pooling (`norm`), or, for weights trained with timm's average
pooling, after it (`fc_norm`). Where the weights pool by attention (SigLIP), that stays the pooling,
and its norm is tuned too.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Inputs, Layer, Thinnable, WithoutGrad, norm_parameters_of
from mdpd_deploy.backbones.declared import NORMS_SECOND, TIMM
from mdpd_deploy.backbones.discover import is_tuned
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class VitBackbone(Thinnable):
    """A timm vision transformer without its classifier.

    Args:
        model: As `timm.create_model(..., num_classes=0)` returns it, and `is_plain`.
    """

    family = "vit"
    input_names = ("pixel_values",)

    def __init__(self, model: "VisionTransformer") -> None:
        super().__init__()
        self.model = model
        self.width = model.embed_dim
        attention: Any = model.blocks[0].get_submodule("attn")
        self.heads = attention.num_heads
        self.prefix_tokens = model.num_prefix_tokens
        self.has_cls = model.cls_token is not None
        rows, columns = model.patch_embed.grid_size
        self.grid = (rows, columns)
        self.norm_after_pool = not isinstance(model.fc_norm, nn.Identity)
        self.pooling = "mean"
        self.preprocess = image_preprocess(model)
        self.takes_prompt = self.makes_thin = _class_of(model) == "VisionTransformer"
        self.set_attention("sdpa")

    def blocks(self) -> Sequence[nn.Module]:
        """Return timm's blocks."""
        return list(self.model.blocks)

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """Run timm's forward; pictures have no padding, so `mask` is always None."""
        pixels = inputs["pixel_values"].to(self.model.patch_embed.proj.weight.dtype)
        return self.model.forward_features(pixels)

    def final_norm(self) -> nn.Module | None:
        """Return the pretrained final norm; None for weights that never had one."""
        norm = self.model.fc_norm if self.norm_after_pool else self.model.norm
        return None if isinstance(norm, nn.Identity) else norm

    def finish(self, x: Tensor, mask: Tensor | None, *, blocked: bool = False) -> Tensor:
        """Final norm and pooling in the order that the weights were trained with: [B, D]."""
        if self.norm_after_pool:
            return self.normalise(self.pool(x, mask), blocked=blocked)
        pool: Any = self.model.attn_pool if self.pools_by_attention else None
        if pool is None:
            return super().finish(x, mask, blocked=blocked)
        first = 0 if getattr(self.model, "pool_include_prefix", True) else self.prefix_tokens
        x = self.normalise(x, blocked=blocked)[:, first:]
        out: Tensor = (WithoutGrad(pool) if blocked else pool)(x)
        return out

    @property
    def pools_by_attention(self) -> bool:
        """Whether a pretrained attention pool makes the features from all tokens."""
        return getattr(self.model, "attn_pool", None) is not None

    def final_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Return those of the final norm and of the norm in an attention pool, by full name."""
        found = super().final_norm_parameters()
        if not self.pools_by_attention:
            return found
        pool: Any = self.model.attn_pool
        norms = [part for name, part in pool.named_modules() if is_tuned(name, part)]
        return found | norm_parameters_of(pool, "model.attn_pool.", norms)

    def block_norms(self, index: int) -> dict[str, nn.Parameter]:
        """Return scale and shift of norm1 and norm2; not of q/k norms."""
        block = self.blocks()[index]
        norms = [block.get_submodule(name) for name in ("norm1", "norm2")]
        return norm_parameters_of(block, f"model.blocks.{index}.", norms)

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
        device = self.model.patch_embed.proj.weight.device
        return random_pictures(batch, image_size(self.model), device)

    def thin_block(self, index: int, reduction: int) -> nn.Module:
        """Return a fresh timm block of width D / reduction with the same number of heads."""
        old: Any = self.blocks()[index]
        if not self.makes_thin:
            raise UserError(
                f"side.name=lst: no thinner copy of timm's {type(old).__name__} with positions of "
                "its own is known; use another side network."
            )
        width = self.width // reduction
        hidden = old.mlp.fc2.in_features // reduction * self._gated(old)
        norm: Any = type(old.norm1)
        plain = nn.Identity()  # a `ResPostBlock` has no LayerScale
        make: Callable[..., nn.Module] = type(old)
        return make(
            width,
            self.heads,
            mlp_ratio=(hidden + 0.5) / width,  # timm takes the whole part of width × ratio
            qkv_bias=old.attn.qkv.bias is not None,
            qk_norm=not isinstance(old.attn.q_norm, nn.Identity),
            scale_attn_norm=not isinstance(old.attn.norm, nn.Identity),
            scale_mlp_norm=not isinstance(old.mlp.norm, nn.Identity),
            proj_bias=old.attn.proj.bias is not None,
            init_values=None if isinstance(getattr(old, "ls1", plain), nn.Identity) else 1.0,
            act_layer=type(old.mlp.act),
            norm_layer=partial(norm, eps=old.norm1.eps),
            mlp_layer=type(old.mlp),
            attn_layer=type(old.attn),
            depth=index,
        )

    def layers(self, index: int) -> tuple[Layer, ...]:
        """Return norm, attention, norm, MLP; in a post-norm block the norms come second.

        Norms inside the attention and the MLP (BEiT-3, EVA-02) stand before the map that reads them.
        """
        block: Any = self.blocks()[index]
        attention = (_queries(block), *_inner(block, "attn"), Layer(("attn.proj",)))
        mlp = (
            Layer(_mlp_inputs(block), stacked=self._gated(block)),
            *_inner(block, "mlp"),
            Layer(("mlp.fc2",)),
        )
        first, second = Layer(("norm1",), linear=False), Layer(("norm2",), linear=False)
        if type(block).__name__ in NORMS_SECOND:
            return (*attention, first, *mlp, second)
        return (first, *attention, second, *mlp)

    @staticmethod
    def _gated(block: Any) -> int:
        """Return 2 where one map of the MLP holds gate and value, one below the other; else 1."""
        first = block.get_submodule(_mlp_inputs(block)[0])
        return int(first.out_features // block.mlp.fc2.in_features)

    def embedding_weight(self) -> tuple[Tensor, int]:
        """Return the patch projection [D, 3, patch, patch]."""
        return self.model.patch_embed.proj.weight, 0

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager" for this instance, or within a module, only."""
        switch_fused(within or self.model, kind)


def _mlp_inputs(block: nn.Module) -> tuple[str, ...]:
    """Return the maps that an MLP begins with: one, or gate and value side by side (AIMv2)."""
    names = dict(block.get_submodule("mlp").named_children())
    for inputs in (("fc1",), ("fc1_g", "fc1_x")):
        if {*inputs, "fc2"} <= names.keys():
            return tuple(f"mlp.{name}" for name in inputs)
    raise UserError(
        f"the blocks of this backbone have an MLP ({type(block.get_submodule('mlp')).__name__}) "
        "that this method or side network cannot take apart: choose another."
    )


def _queries(block: Any) -> Layer:
    """Return the maps of query, key and value, or the one that holds all three."""
    if getattr(block.attn, "q_bias", None) is not None:
        raise UserError(
            f"the blocks of this backbone ({type(block).__name__}) read the weight of attn.qkv "
            "without calling the layer, so that no adapter can add to it: use another method."
        )
    if block.attn.qkv is None:
        return Layer(("attn.q_proj", "attn.k_proj", "attn.v_proj"))
    return Layer(("attn.qkv",), stacked=3)


def _inner(block: nn.Module, part: str) -> tuple[Layer, ...]:
    """Return the norm inside a part of a block, if it has one."""
    plain = nn.Identity()
    norm = getattr(block.get_submodule(part), "norm", plain)
    return () if isinstance(norm, nn.Identity) else (Layer((f"{part}.norm",), linear=False),)


def is_plain(model: nn.Module) -> bool:
    """Tell whether a timm model is a plain vision transformer, as this file takes it."""
    from timm.layers.patch_embed import PatchEmbed

    blocks = TIMM.get(_class_of(model), ())
    facts: Any = model
    return (
        bool(blocks)
        and type(facts.patch_embed) is PatchEmbed
        and all(type(block).__name__ in blocks for block in facts.blocks)
    )


def _class_of(model: nn.Module) -> str:
    """Return the name of the class in `TIMM` that a model is an instance of, or of its own."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((name for name in names if name in TIMM), names[0])


def switch_fused(module: nn.Module, kind: str) -> None:
    """Choose "sdpa" or "eager" attention for timm's blocks within a module."""
    if kind not in ("sdpa", "eager"):
        raise unknown("attention", kind, ("sdpa", "eager"))
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            attention: Any = part
            attention.fused_attn = kind == "sdpa"


def random_pictures(batch: int, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, *size, generator=generator)
    return {"pixel_values": pixels.to(device)}


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) that a timm model takes, or was trained at."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    facts: Any = model
    height, width = size or facts.pretrained_cfg["input_size"][1:]
    return height, width


def image_preprocess(model: nn.Module) -> ImagePreprocess:
    """Return the evaluation preprocessing of the weights, at the model's picture size."""
    from timm.data.config import resolve_model_data_config

    resolve: Any = resolve_model_data_config  # untyped in timm
    facts = resolve(model)
    red, green, blue = facts["mean"]
    std_red, std_green, std_blue = facts["std"]
    return ImagePreprocess(
        size=image_size(model),
        mean=(red, green, blue),
        std=(std_red, std_green, std_blue),
        interpolation=facts["interpolation"],
        crop_pct=facts["crop_pct"],
        crop_mode=facts["crop_mode"],
    )
