"""Declared encoders of transformers (`declared.py`): a plain chain of blocks, with its taps.

Embedding norms are never tuned, and poolers that were trained for another task are not loaded.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Inputs, Layer, Thinnable, norm_parameters_of
from mdpd_deploy.backbones.build import explaining
from mdpd_deploy.backbones.declared import Declaration
from mdpd_deploy.backbones.vit import random_pictures
from mdpd_deploy.data.preprocess import ImagePreprocess, TextPreprocess
from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Transformer(Thinnable):
    """A transformers encoder whose blocks and layers are declared.

    Args:
        model: Without its pooler.
        declared: Of its model type.
    """

    family = "transformers"
    pooling = "mean"

    def __init__(self, model: "PreTrainedModel", declared: Declaration) -> None:
        super().__init__()
        self.model = model
        self.declared = declared
        self.width = model.config.hidden_size
        self.heads = model.config.num_attention_heads
        self.takes_prompt = declared.longer
        self.set_attention("sdpa")

    def blocks(self) -> Sequence[nn.Module]:
        """Return transformers' layers."""
        blocks = self.model.get_submodule(self.declared.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    def final_norm(self) -> nn.Module | None:
        """Return the declared one."""
        path = self.declared.final_norm
        return None if path is None else self.model.get_submodule(path)

    def block_norms(self, index: int) -> dict[str, nn.Parameter]:
        """Return scale and shift of the block's declared norms."""
        block = self.blocks()[index]
        norms = [
            block.get_submodule(layer.paths[0]) for layer in self.layers(index) if not layer.linear
        ]
        return norm_parameters_of(block, f"model.{self.declared.blocks}.{index}.", norms)

    def thin_block(self, index: int, reduction: int) -> nn.Module:
        """Return a fresh transformers layer of width D / reduction with as many heads."""
        make = type(self.blocks()[index])
        if not self.declared.thin:
            raise UserError(
                f"side.name=lst: a thinner copy of {make.__name__} could not read the positions "
                "that those of the backbone read; use another side network."
            )
        config = copy.deepcopy(self.model.config)
        for name in ("hidden_size", self.declared.hidden):
            if hasattr(config, name):
                setattr(config, name, getattr(config, name) // reduction)
        config._attn_implementation = "sdpa" if self.model._supports_sdpa else "eager"
        made: nn.Module = make(config)
        return made

    def layers(self, index: int) -> tuple[Layer, ...]:
        """Return the declared layers, without norms that the block has an identity for."""
        block = self.blocks()[index]
        return tuple(
            layer
            for layer in self.declared.layers
            if not isinstance(block.get_submodule(layer.paths[0]), nn.Identity)
        )

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager" for this instance, or within a module, only."""
        choose_attention(self.model, kind)
        for part in () if within is None else within.modules():
            if hasattr(part, "config"):
                attention: Any = part
                attention.config._attn_implementation = self.model.config._attn_implementation


class TextTransformer(Transformer):
    """A declared text encoder; texts are pooled over their real tokens.

    Args:
        model: Without its pooler.
        declared: Of its model type.
        preprocess: Its tokenizer with the lengths in use.
    """

    prefix_tokens = 0
    has_cls = True
    grid = None

    def __init__(
        self, model: "PreTrainedModel", declared: Declaration, preprocess: TextPreprocess
    ) -> None:
        super().__init__(model, declared)
        self.input_names = preprocess.input_names
        self.preprocess = preprocess
        self.max_length = preprocess.max_length
        self.pad_id = preprocess.pad_id
        takes = inspect.signature(self.blocks()[0].forward).parameters
        self.takes_prefix = "past_key_values" in takes

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Any:
        """Run transformers' forward.

        Where blocks take more tokens than the embedding made, the token mask becomes the additive
        one [B, 1, 1, N], which the library hands to them as it is and which means the same to
        "sdpa" and "eager"; elsewhere it stays [B, N].
        """
        given = {name: inputs[name] for name in self.input_names if name in inputs}
        if mask is not None and self.declared.longer:
            dtype = self.embedding_weight()[0].dtype
            mask = (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        return self.model(**given | {"attention_mask": mask})

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Return the attention mask [B, N], 1 for real tokens."""
        return inputs.get("attention_mask")

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random texts of `tokens` tokens, every second one padded by a quarter.

        The global random state is untouched.
        """
        assert isinstance(self.preprocess, TextPreprocess)
        device = next(self.parameters()).device
        return random_texts(self.preprocess, self.model.config.vocab_size, batch, tokens, device)

    def embedding_weight(self) -> tuple[Tensor, int]:
        """Return the word embeddings [V, D], or the map of narrower ones [D, E]."""
        words: Any = self.model.get_input_embeddings()
        path = self.declared.project
        if path is None or words.weight.shape[1] == self.width:
            return words.weight, 1
        projection: Any = self.model.get_submodule(path)
        return projection.weight, 0


class PictureTransformer(Transformer):
    """A declared vision encoder; its patch tokens are pooled behind the final norm.

    Args:
        model: Without its pooler.
        declared: Of its model type.
        preprocess: How its pictures are prepared.
        name: What the user called it, for messages.
    """

    input_names = ("pixel_values",)

    def __init__(
        self,
        model: "PreTrainedModel",
        declared: Declaration,
        preprocess: ImagePreprocess,
        name: str,
    ) -> None:
        super().__init__(model, declared)
        self.preprocess = preprocess
        self.size = preprocess.size
        rows, columns = (edge // model.config.patch_size for edge in preprocess.size)
        self.grid = (rows, columns)
        self.prefix_tokens = 0  # until one forward tells
        mend = "Check the size of its pictures in preprocessor_config.json."
        with explaining(f"backbone.name: {name} cannot be run", mend), torch.no_grad():
            tokens = self.eval().trace(self.example_inputs(1), last=0).taps[0].shape[1]
        self.prefix_tokens = tokens - rows * columns
        self.has_cls = self.prefix_tokens > 0

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Any:
        """Run transformers' forward; pictures have no padding, so `mask` is always None."""
        weight = self.embedding_weight()[0]
        return self.model(pixel_values=inputs["pixel_values"].to(weight.dtype))

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
        return random_pictures(batch, self.size, self.embedding_weight()[0].device)

    def embedding_weight(self) -> tuple[Tensor, int]:
        """Return the patch projection [D, 3, patch, patch]."""
        return next(m.weight for m in self.model.modules() if isinstance(m, nn.Conv2d)), 0


def choose_attention(model: "PreTrainedModel", kind: str) -> None:
    """Choose "sdpa" or "eager" attention; a model that has one form only keeps it."""
    if kind not in ("sdpa", "eager"):
        raise unknown("attention", kind, ("sdpa", "eager"))
    if not hasattr(model, "set_attn_implementation"):  # a tower may be a bare module
        return
    model.set_attn_implementation(kind if model._supports_sdpa else "eager")


def random_texts(
    preprocess: TextPreprocess,
    vocabulary: int,
    batch: int,
    tokens: int | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return random texts of `tokens` tokens, every second one padded by a quarter.

    The global random state is untouched.
    """
    count = tokens or min(preprocess.max_length, 16)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(vocabulary - 1, (batch, count), generator=generator)
    words = words + (words >= preprocess.pad_id)  # every id but the padding one
    lengths = count - (torch.arange(batch) % 2) * (count // 4)
    real = torch.arange(count) < lengths[:, None]
    made = {
        "input_ids": torch.where(real, words, preprocess.pad_id),
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros_like(words),
    }
    return {name: made[name].to(device) for name in preprocess.input_names}
