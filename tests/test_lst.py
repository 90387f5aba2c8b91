"""LST: its parameter budgets, and the weights it inherits from the backbone."""

import pytest
import timm
import torch
from torch import Tensor, nn

from mdpd_deploy import fit
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.declared import TEXT
from mdpd_deploy.backbones.transformer import TextTransformer
from mdpd_deploy.backbones.vit import VitBackbone
from mdpd_deploy.config import BackboneConfig, SideConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides import build_side
from mdpd_deploy.sides.lst import LST
from mdpd_deploy.sides.pruning import copy_largest, largest
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.fisher import fisher, inherit_important
from mdpd_deploy.train.setup import prepare


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def no_block(index: int, x: Tensor) -> Tensor:
    raise AssertionError("this side network runs no backbone block")


@pytest.mark.parametrize(
    ("width", "depth", "heads", "budget"),
    [(768, 12, 12, 2_376_492), (1536, 40, 24, 30_190_696)],
    ids=["ViT-B", "ViT-g"],
)
def test_budget_vit(width, depth, heads, budget):
    with torch.device("meta"):
        model = timm.create_model(
            "vit_base_patch16_224", embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
        backbone = VitBackbone(model)
        assert count(build_side(backbone, SideConfig(name="lst", init="random"))) == budget


def test_budget_bert():
    """r = 4, up map 192 → 1024 (the 1,024 of VSE's text encoder), without its pooling."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
        backbone = TextTransformer.__new__(TextTransformer)
        nn.Module.__init__(backbone)
        backbone.model, backbone.declared = model, TEXT["bert"]
        blocks = [backbone.thin_block(index, 4) for index in range(12)]
        side = LST(768, 192, blocks, out_width=1024, bias=False, norm=None)
    assert count(side) == 7_465_644 - 13_728


def load(kind, tiny_vit, tiny_bert):
    folder = tiny_vit if kind == "vit" else tiny_bert
    return load_backbone(BackboneConfig(name=str(folder)), max_length=24)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_without_reduction_the_blocks_are_the_backbones_own(kind, tiny_vit, tiny_bert):
    """r = 1 keeps every unit: the inherited blocks must compute what the backbone's do."""
    backbone = load(kind, tiny_vit, tiny_bert).eval()
    side = build_side(backbone, SideConfig(name="lst", reduction=1)).eval()
    inputs = backbone.example_inputs(2, 9)
    trace = backbone.trace(inputs)
    for index, block in enumerate(side.blocks):
        x, expected = trace.taps[index : index + 2]
        torch.testing.assert_close(backbone.run_block(trace, index, x, block=block), expected)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_most_important_units_are_inherited(kind, tiny_vit, tiny_bert):
    """Large weights on the even units of every layer: exactly those must survive."""
    backbone = load(kind, tiny_vit, tiny_bert)
    even = torch.arange(0, 32, 2)
    weight, axis = backbone.embedding_weight()
    weight.data.index_fill_(axis, even, 3.0)
    for index in range(backbone.depth):
        for layer in backbone.layers(index):
            for path in layer.paths:
                module = backbone.blocks()[index].get_submodule(path)
                rows = torch.arange(0, len(module.weight), 2)
                module.weight.data[rows] += torch.sign(module.weight.data[rows]) * 5
                module.bias.data.copy_(torch.arange(len(module.bias)).float())
    side = build_side(backbone, SideConfig(name="lst", reduction=2))
    for index, block in enumerate(side.blocks):
        for layer in backbone.layers(index):
            for path in layer.paths:
                old, new = backbone.blocks()[index].get_submodule(path), block.get_submodule(path)
                units = torch.arange(0, len(old.weight), 2)
                assert torch.equal(new.bias.data, units.float())
                kept = old.weight[units][:, ::2] if layer.linear else old.weight[units]
                assert torch.equal(new.weight.data, kept)


# A block's layers in forward order; those in one group keep the same units.
GROUPS = {
    "bert": [
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        ["attention.output.dense"], ["attention.output.LayerNorm"],
        ["intermediate.dense"], ["output.dense"], ["output.LayerNorm"],
    ],
    "vit": [["norm1"], ["attn.qkv"], ["attn.proj"], ["norm2"], ["mlp.fc1"], ["mlp.fc2"]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_units_are_walked_in_forward_order_each_layer_after_the_one_before(
    kind, tiny_vit, tiny_bert
):
    """The released "fisher-v2" by hand: random importances tell its rules from any others.

    Query, key and value go by the elementwise product of their importances; a layer's inputs are
    what the layer before kept, so that the residual stream differs from layer to layer.
    """
    backbone = load(kind, tiny_vit, tiny_bert)
    random = torch.Generator().manual_seed(0)
    importance = {
        weight: torch.rand(weight.shape, generator=random) ** 4 for weight in backbone.parameters()
    }
    for weight in backbone.parameters():  # norms and biases too, which are 1 and 0
        weight.data += 0.1 * torch.randn(weight.shape, generator=random)
    side = build_side(backbone, SideConfig(name="lst", reduction=2))
    copy_largest(backbone, side.blocks, side.up[0] if kind == "vit" else None, importance.get)

    def half(scores):
        return scores.argsort(descending=True)[: len(scores) // 2].sort().values

    model = backbone.model
    keep = half(
        importance[model.patch_embed.proj.weight].sum((1, 2, 3))
        if kind == "vit"
        else importance[model.embeddings.word_embeddings.weight].sum(0)
    )
    stream = []
    for index, thin in enumerate(side.blocks):
        for paths in GROUPS[kind]:
            olds = [backbone.blocks()[index].get_submodule(path) for path in paths]
            news = [thin.get_submodule(path) for path in paths]
            if not isinstance(olds[0], nn.Linear):
                assert torch.equal(news[0].weight, olds[0].weight[keep])
                assert torch.equal(news[0].bias, olds[0].bias[keep])
                continue
            maps = [part for old in olds for part in importance[old.weight].chunk(
                3 if paths == ["attn.qkv"] else 1)]  # fmt: skip
            kept = half(torch.stack([part[:, keep] for part in maps]).prod(dim=0).sum(dim=1))
            rows = kept
            if paths == ["attn.qkv"]:
                rows = torch.cat([kept, kept + 32, kept + 64])
            for old, new in zip(olds, news, strict=True):
                assert torch.equal(new.weight, old.weight[rows][:, keep]), (index, paths)
                assert torch.equal(new.bias, old.bias[rows])
            keep = kept
        stream.append(keep.tolist())
    assert len({tuple(units) for units in stream}) == backbone.depth, "tied would be one set"
    if kind == "vit":
        assert torch.equal(side.up[0].weight, model.norm.weight[keep])


def test_importance_decides_not_size(tiny_vit):
    """With importance 1 / |w| the smallest units survive instead."""
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit)))
    config = SideConfig(name="lst", reduction=2)
    large, small = build_side(backbone, config), build_side(backbone, config)
    copy_largest(backbone, small.blocks, None, importance=lambda p: 1 / p.abs().clamp_min(1e-6))
    mean = {side: side.blocks[0].mlp.fc2.weight.abs().mean() for side in (large, small)}
    assert mean[small] < mean[large]


def test_largest_keeps_order_and_breaks_ties_by_position():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, 0.0])
    assert largest(scores, 3).tolist() == [1, 2, 4]
    assert largest(torch.ones(6), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    "options", [{"depth": 2}, {"mlp": "swiglu"}, {"init_values": 0.5}, {"qk_norm": True}]
)
def test_thin_blocks_of_every_plain_vision_transformer(options):
    """Gated MLPs (DINOv2 giant), LayerScale and q/k norms are copied too."""
    from timm.layers.mlp import SwiGLUPacked

    more = dict(options)
    if more.pop("mlp", None):
        more |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4.0}
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **({"depth": 1} | shape | more))
    backbone = VitBackbone(model)
    side = build_side(backbone, SideConfig(name="lst", reduction=2))
    taps = [torch.randn(2, 5, 32) for _ in range(backbone.depth + 1)]
    out = side(taps, None, lambda index, x, block: block(x))
    assert out.tokens.shape == (2, 5, 32) and out.tokens.isfinite().all()
    own = sum(p.numel() for p in backbone.blocks()[0].mlp.fc1.parameters())
    thin = sum(p.numel() for p in side.blocks[0].mlp.fc1.parameters())
    assert 3 < own / thin < 4


def test_a_width_that_the_heads_do_not_divide_is_refused(tiny_vit):
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit)))
    with pytest.raises(UserError, match=r"a multiple of its 4 heads\. Valid values: 1, 2, 4\."):
        build_side(backbone, SideConfig(name="lst", reduction=8))


@pytest.fixture
def fisher_setup(image_options):
    options = {
        "data": {"path": str(image_options["data"])},
        "backbone": {"name": str(image_options["backbone"])},
        "side": {"name": "lst", "reduction": 2, "init": "fisher"},
    }
    return prepare(check_config({"task": "classify", "method": "side", **options}))


def test_fisher_is_the_sum_of_squared_gradients_of_single_examples(fisher_setup):
    """Against a loop by hand over all 36 examples, whose order then does not matter."""
    backbone, train = fisher_setup.backbone, fisher_setup.data.train
    found = fisher(fisher_setup, len(train))
    assert not any(p.requires_grad for p in backbone.parameters()), "as it was before"
    torch.manual_seed(fisher_setup.config.train.seed)
    head = Head(backbone.width, 3)
    backbone.requires_grad_(True).eval()
    expected = {name: torch.zeros_like(p) for name, p in backbone.named_parameters()}
    for picture, label in zip(train.inputs, train.labels, strict=True):
        arrays = backbone.preprocess([picture])
        logits = head.linear(backbone({name: torch.from_numpy(a) for name, a in arrays.items()}))
        backbone.zero_grad()
        nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        for name, weight in backbone.named_parameters():
            expected[name] += weight.grad**2
    for name, weight in backbone.named_parameters():
        torch.testing.assert_close(found[weight], expected[name], rtol=1e-3, atol=1e-9, msg=name)
        assert expected[name].any(), name


def test_a_side_network_is_built_anew_from_what_fisher_finds(fisher_setup):
    before = fisher_setup.method.modules["side"].blocks[0].mlp.fc1.weight.detach().clone()
    said = []
    inherit_important(fisher_setup, said.append)
    assert not torch.equal(before, fisher_setup.method.modules["side"].blocks[0].mlp.fc1.weight)
    assert said == ["side.init=fisher: squared gradients of 36 examples"]


def test_fisher_runs_train_and_say_what_they_do(image_options, tmp_path):
    run = fit(
        out=tmp_path / "run", method="side", side="lst", quiet=True, **image_options,
        set=["side.init=fisher", "side.reduction=2"],
    )  # fmt: skip
    assert run.summary["status"] == "completed"


@pytest.mark.parametrize(
    ("side", "option"),
    [("unipt", "init=fisher"), ("lst", "variant=paper"), ("sherl", "projection=d-d")],
)
def test_an_option_that_would_be_ignored_is_refused(side, option, tiny_vit):
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit)))
    name, value = option.split("=")
    with pytest.raises(UserError, match=f"side.{option} is read by --side .* only"):
        build_side(backbone, SideConfig(name=side, reduction=2, **{name: value}))
