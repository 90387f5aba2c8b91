"""What encoders of one kind keep where: one declaration per model type.

A declared encoder has taps, so it takes side networks and adapters; any other is taken whole
(`whole.py`). A new kind is an entry here and a row of `tests/test_declared.py`. Declare only
encoders whose blocks run one after the other, each on what the one before it gave, [B, N, D].
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mdpd_deploy.backbones.base import Layer


@dataclass(frozen=True)
class Declaration:
    """Where one model type keeps what side networks and adapters need.

    Attributes:
        layers: Those of a block, by their paths in it, in the order in which a token passes them.
        blocks: Path of the list of blocks.
        final_norm: Path of the norm behind the last block; None where every block ends in one.
        hidden: Config entry of the MLP's width.
        project: Path of the map of narrower word embeddings to D, of models that have it.
        offset: Whether positions start behind the padding index, as in RoBERTa.
        longer: Whether blocks take more tokens than the embedding made, such as a prompt; not
            where they themselves tell tokens' positions apart.
        thin: Whether a copy of width D / r runs on what the blocks are called with; not where
            that has a width of its own, such as a rotary table.
        only: Config entries that must have these values; with others a model is taken whole.
    """

    layers: tuple[Layer, ...]
    blocks: str = "encoder.layer"
    final_norm: str | None = None
    hidden: str = "intermediate_size"
    project: str | None = None
    offset: bool = False
    longer: bool = True
    thin: bool = True
    only: Mapping[str, Any] = field(default_factory=dict)


def linear(*paths: str, stacked: int = 1) -> Layer:
    """Name linear maps that read the same inputs, query, key and value among them in this order."""
    return Layer(paths, stacked)


def norm(path: str) -> Layer:
    """Name a tuned norm; where a block has an identity in its place it has none."""
    return Layer((path,), linear=False)


def named(prefix: str, *names: str) -> Layer:
    """Name linear maps with the beginning of their paths written once."""
    return linear(*(f"{prefix}.{name}" for name in names))


ATTENTION = (named("attention.self", "query", "key", "value"), linear("attention.output.dense"))
MLP = (linear("intermediate.dense"), linear("output.dense"))
BERT = (*ATTENTION, norm("attention.output.LayerNorm"), *MLP, norm("output.LayerNorm"))
LLAMA_ATTENTION = (named("self_attn", "q_proj", "k_proj", "v_proj"), linear("self_attn.o_proj"))
GATED_MLP = (named("mlp", "gate_proj", "up_proj"), linear("mlp.down_proj"))

TEXT: dict[str, Declaration] = {
    "bert": Declaration(BERT),
    "roberta": Declaration(BERT, offset=True),
    "xlm-roberta": Declaration(BERT, offset=True),
    "electra": Declaration(BERT, project="embeddings_project"),
    "camembert": Declaration(BERT, offset=True),
    "mpnet": Declaration(
        (
            named("attention.attn", "q", "k", "v"),
            linear("attention.attn.o"),
            norm("attention.LayerNorm"),
            *MLP,
            norm("output.LayerNorm"),
        ),
        offset=True,
        longer=False,  # blocks add a bias per pair of positions, whatever their width
    ),
    "data2vec-text": Declaration(BERT, offset=True),
    "ernie": Declaration(BERT),
    "rembert": Declaration(BERT, project="encoder.embedding_hidden_mapping_in"),
    "roformer": Declaration(BERT, project="embeddings_project", longer=False, thin=False),
    "roberta-prelayernorm": Declaration(
        (norm("attention.LayerNorm"), *ATTENTION, norm("intermediate.LayerNorm"), *MLP),
        final_norm="LayerNorm",
        offset=True,
    ),
    "xlm-roberta-xl": Declaration(
        (norm("attention.self_attn_layer_norm"), *ATTENTION, norm("LayerNorm"), *MLP),
        final_norm="encoder.LayerNorm",
        offset=True,
    ),
    "megatron-bert": Declaration(
        (norm("attention.ln"), *ATTENTION, norm("ln"), *MLP), final_norm="encoder.ln"
    ),
    "distilbert": Declaration(
        (
            named("attention", "q_lin", "k_lin", "v_lin"),
            linear("attention.out_lin"),
            norm("sa_layer_norm"),
            linear("ffn.lin1"),
            linear("ffn.lin2"),
            norm("output_layer_norm"),
        ),
        blocks="transformer.layer",
        hidden="hidden_dim",
    ),
    "deberta": Declaration(
        (linear("attention.self.in_proj", stacked=3), *BERT[1:]),
        project="embeddings.embed_proj",
        longer=False,
        thin=False,
    ),
    "deberta-v2": Declaration(
        (named("attention.self", "query_proj", "key_proj", "value_proj"), *BERT[1:]),
        project="embeddings.embed_proj",
        only={"conv_kernel_size": 0},  # a convolution would lie between two blocks
        longer=False,
        thin=False,
    ),
    "modernbert": Declaration(
        (
            norm("attn_norm"),
            linear("attn.Wqkv", stacked=3),
            linear("attn.Wo"),
            norm("mlp_norm"),
            linear("mlp.Wi", stacked=2),
            linear("mlp.Wo"),
        ),
        blocks="layers",
        final_norm="final_norm",
        longer=False,
        thin=False,
    ),
    **{
        kind: Declaration(
            (
                *LLAMA_ATTENTION,
                norm("post_attention_layernorm"),
                *mlp,
                norm("post_mlp_layernorm"),
            ),
            blocks="layers",
            longer=False,
            thin=False,
        )
        for kind, mlp in (
            ("gte", GATED_MLP),
            ("nomic_bert", GATED_MLP),
            ("jina_embeddings_v3", (linear("mlp.fc1"), linear("mlp.fc2"))),
        )
    },
    "eurobert": Declaration(
        (
            norm("input_layernorm"),
            *LLAMA_ATTENTION,
            norm("post_attention_layernorm"),
            *GATED_MLP,
        ),
        blocks="layers",
        final_norm="norm",
        longer=False,
        thin=False,
    ),
}

VIT = (
    norm("layernorm_before"),
    named("attention", "q_proj", "k_proj", "v_proj"),
    linear("attention.o_proj"),
    norm("layernorm_after"),
    linear("mlp.fc1"),
    linear("mlp.fc2"),
)
DINO = (norm("norm1"), *VIT[1:3], norm("norm2"), *VIT[4:])
PICTURES: dict[str, Declaration] = {
    **dict.fromkeys(
        ("vit", "deit", "ijepa", "vit_msn"),
        Declaration(VIT, blocks="layers", final_norm="layernorm"),
    ),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers"),
        Declaration(DINO, final_norm="layernorm", only={"use_swiglu_ffn": False}),
    ),
    "dinov3_vit": Declaration(
        (*DINO[:4], linear("mlp.up_proj"), linear("mlp.down_proj")),
        blocks="model.layer",
        final_norm="norm",
        only={"use_gated_mlp": False},
        longer=False,
        thin=False,
    ),
}

# timm's classes, with those of their blocks: [B, N, D] with `norm1` and `norm2` around or behind
# attention and MLP. Only the first class makes thinner blocks, and takes more tokens than its own.
TIMM = {
    "VisionTransformer": ("Block", "ResPostBlock"),
    "Eva": ("EvaBlock", "EvaBlockPostNorm"),  # EVA-02, DINOv3, the Perception Encoder
    "Beit": ("Block",),
    "VisionTransformerRelPos": ("RelPosBlock", "ResPostRelPosBlock"),
}
NORMS_SECOND = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")


def declaration_of(config: Any) -> Declaration | None:
    """Return how a model of this transformers config is declared; None where it is not."""
    found = (TEXT | PICTURES).get(config.model_type)
    if found is None:
        return None
    fits = all(getattr(config, name, value) == value for name, value in found.only.items())
    return found if fits else None
