"""BERT-family text encoders of transformers: BERT, MiniLM, RoBERTa, XLM-RoBERTa, DistilBERT.

All are post-norm: each block ends in a LayerNorm, there is no final norm, and the embedding norm
is never tuned. The pooler is not loaded; texts are pooled over their real tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Inputs, Layer, norm_parameters_of
from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Where one model type keeps what we need.

    Attributes:
        blocks: Path of the list of blocks.
        norms: Paths of the two norms inside a block.
        maps: Paths of query, key, value, output, and of the two feed-forward maps.
        width: Config entry of D.
        hidden: Config entry of the feed-forward width.
        offset: Whether positions start behind the padding index, as in RoBERTa.
        segments: Whether the embeddings take `token_type_ids`.
        prefix: Whether the attention takes keys and values of a cache.
    """

    blocks: str = "encoder.layer"
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm")
    maps: tuple[str, ...] = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    width: str = "hidden_size"
    hidden: str = "intermediate_size"
    offset: bool = False
    segments: bool = True
    prefix: bool = True


LAYOUTS = {
    "bert": Layout(),
    "roberta": Layout(offset=True),
    "xlm-roberta": Layout(offset=True),
    "distilbert": Layout(
        blocks="transformer.layer",
        norms=("sa_layer_norm", "output_layer_norm"),
        maps=(
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ),
        width="dim",
        hidden="hidden_dim",
        segments=False,
        prefix=False,
    ),
}


class BertBackbone(Backbone):
    """A transformers encoder without its pooler.

    Args:
        model: A model of one of the types in `LAYOUTS`.
        preprocess: Its tokenizer with the lengths in use.
    """

    family = "bert"
    prefix_tokens = 0
    has_cls = True
    grid = None

    def __init__(self, model: "PreTrainedModel", preprocess: TextPreprocess) -> None:
        super().__init__()
        self.model = model
        self.layout = LAYOUTS[model.config.model_type]
        self.width = getattr(model.config, self.layout.width)
        self.heads = model.config.num_attention_heads
        self.input_names = preprocess.input_names
        self.preprocess = preprocess
        self.max_length = preprocess.max_length
        self.pad_id = preprocess.pad_id
        self.pooling = "mean"
        self.takes_prefix = self.layout.prefix
        self.set_attention("sdpa")

    def blocks(self) -> Sequence[nn.Module]:
        """Return transformers' layers."""
        blocks = self.model.get_submodule(self.layout.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Any:
        """Run transformers' forward.

        The token mask becomes the additive one [B, 1, 1, N], which the library hands to its blocks
        as it is and which means the same to "sdpa" and "eager".
        """
        given: dict[str, Tensor] = {"input_ids": inputs["input_ids"]}
        if self.layout.segments and "token_type_ids" in inputs:
            given["token_type_ids"] = inputs["token_type_ids"]
        if mask is not None:
            dtype = self.embedding_weight()[0].dtype
            given["attention_mask"] = (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(
                dtype
            ).min
        return self.model(**given)

    def final_norm(self) -> nn.Module | None:
        """Return None: the last block ends in its own norm."""
        return None

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Return the attention mask [B, N], 1 for real tokens."""
        return inputs.get("attention_mask")

    def block_norms(self, index: int) -> dict[str, nn.Parameter]:
        """Return scale and shift of the block's two LayerNorms."""
        block = self.blocks()[index]
        norms = [block.get_submodule(path) for path in self.layout.norms]
        return norm_parameters_of(block, f"model.{self.layout.blocks}.{index}.", norms)

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random texts of `tokens` tokens, every second one padded by a quarter.

        The global random state is untouched.
        """
        return random_texts(self, self.model.config.vocab_size, batch, tokens)

    def thin_block(self, index: int, reduction: int) -> nn.Module:
        """Return a fresh transformers layer of width D / reduction with as many heads."""
        layout = self.layout
        config = copy.deepcopy(self.model.config)
        for name in (layout.width, layout.hidden):
            setattr(config, name, getattr(config, name) // reduction)
        config._attn_implementation = "sdpa"
        make: Any = type(self.blocks()[index])
        made: nn.Module = make(config)
        return made

    def layers(self, index: int) -> tuple[Layer, ...]:
        """Return attention, norm, feed-forward, norm: the family is post-norm."""
        maps, norms = self.layout.maps, self.layout.norms
        return (
            Layer(maps[:3]),
            Layer(maps[3:4]),
            Layer(norms[:1], linear=False),
            Layer(maps[4:5]),
            Layer(maps[5:6]),
            Layer(norms[1:], linear=False),
        )

    def embedding_weight(self) -> tuple[Tensor, int]:
        """Return the word embeddings [V, D]."""
        words = self.model.get_submodule("embeddings.word_embeddings")
        assert isinstance(words, nn.Embedding)
        return words.weight, 1

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager" for this instance, or within a module, only."""
        if kind not in ("sdpa", "eager"):
            raise unknown("attention", kind, ("sdpa", "eager"))
        self.model.set_attn_implementation(kind)
        for part in () if within is None else within.modules():
            if hasattr(part, "config"):
                attention: Any = part
                attention.config._attn_implementation = kind


def random_texts(
    backbone: Backbone, vocabulary: int, batch: int, tokens: int | None
) -> dict[str, Tensor]:
    """Return random texts of `tokens` tokens, every second one padded by a quarter.

    The global random state is untouched.
    """
    preprocess = backbone.preprocess
    assert isinstance(preprocess, TextPreprocess)
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
    device = next(backbone.parameters()).device
    return {name: made[name].to(device) for name in backbone.input_names}
