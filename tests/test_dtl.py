"""DTL: its parameter budgets, its patterns, and what its graph leaves out."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.config import BackboneConfig, SideConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed, WithSide
from mdpd_deploy.sides import SIDES, SideShape, build_side
from mdpd_deploy.sides.dtl import (
    default_adds,
    default_reads,
    shared_state,
)
from mdpd_deploy.tasks import Classify
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.methods import Batch, build_method

NAMES = ["dtlv1", "dtlv2", "dtlv2-ls"]
VIT_B = SideShape((Layout(768, (14, 14), 1),) * 13, text=False)
VIT_G = SideShape((Layout(1536, (16, 16), 1),) * 41, text=False)

# Patterns of docs/guide.md that give ViT-B's reported sizes, and one for ViT-g.
FOUR_FUSIONS = {
    "kernel": 3, "dtl_reads": [1, 2, 3, 4, 5, 7, 9, 11, 12], "dtl_adds": [7, 9, 11, 12],
}  # fmt: skip
THREE_FUSIONS = {"kernel": 4, "dtl_reads": [1, 2, 3, 5, 7, 9, 11, 12], "dtl_adds": [7, 9, 12]}
TEN_READINGS = {"rank": 4, "dtl_reads": list(range(1, 40, 4)), "dtl_adds": [38, 39, 40]}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("shape", "options", "budget"),
    [
        (VIT_B, {"name": "dtlv1", "kernel": 3}, 43_776),
        (VIT_B, {"name": "dtlv1", "kernel": 4}, 49_152),
        (VIT_B, {"name": "dtlv1"}, 56_064),
        (VIT_G, {"name": "dtlv1", "rank": 4}, 529_920),
        (VIT_B, {"name": "dtlv2"}, 79_104),  # no pattern gives the paper's 0.07 M
        (VIT_B, {"name": "dtlv2-ls"}, 34_560),
        (VIT_B, {"name": "dtlv2", **FOUR_FUSIONS}, 67_584),  # 0.07 M
        (VIT_B, {"name": "dtlv2-ls", **FOUR_FUSIONS}, 37_632),  # 0.04 M
        (VIT_B, {"name": "dtlv2", **THREE_FUSIONS}, 70_656),
        (VIT_B, {"name": "dtlv2-ls", **THREE_FUSIONS}, 39_936),
        (VIT_G, {"name": "dtlv2", **TEN_READINGS}, 274_944),  # 0.27 M
        (VIT_G, {"name": "dtlv2-ls", **TEN_READINGS}, 179_712),  # 0.18 M, two scaled and shifted
    ],
)
def test_budgets(shape, options, budget):
    assert count(SIDES[options["name"]].build(shape, SideConfig(**options))) == budget


def test_default_patterns():
    assert default_reads(VIT_B, 12) == [1, 5, 9, 12] and default_adds(VIT_B, 7) == [7, 9, 12]
    six = SideShape((Layout(8),) * 7, text=True)
    assert default_reads(six, 6) == [1, 5, 6] and default_adds(six, 4) == [4, 6]
    # LS scales nothing there
    assert shared_state(VIT_B, default_reads(VIT_B, 12), default_adds(VIT_B, 7)) == []


def test_fusions_alone_set_m_and_the_last_reading(backbone):
    side = build_side(backbone, SideConfig(name="dtlv2", dtl_adds=[1, 2]))
    assert side.last_tap == 1 and list(side.reads) == ["1", "2"]


def test_the_guides_patterns_are_those_of_the_budgets():
    guide = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    for pattern in (FOUR_FUSIONS, THREE_FUSIONS):
        words = [f"side.{name}={value}".replace(" ", "") for name, value in pattern.items()]
        assert f"`{' '.join(words)}`" in guide


def test_blocks_that_read_one_state_share_it_scaled_and_shifted():
    config = SideConfig(name="dtlv2-ls", dtl_reads=[1, 7], dtl_adds=[7, 8, 9])
    side = SIDES["dtlv2-ls"].build(VIT_B, config)
    assert sorted(side.affine) == ["8", "9"] and len(side.fusions) == 1
    assert count(side) == 2 * 3072 + 3072 + 25 * 768 + 2 * 2 * 768


@pytest.fixture(params=["vit", "bert"])
def backbone(request, tiny_vit, tiny_bert):
    folder = tiny_vit if request.param == "vit" else tiny_bert
    return load_backbone(BackboneConfig(name=str(folder)), max_length=24).eval()


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_the_logits_are_the_frozen_backbones(name, backbone):
    torch.manual_seed(0)
    head = Head(backbone.width, 3)
    torch.nn.init.normal_(head.linear.weight)
    side = build_side(backbone, SideConfig(name=name))
    inputs = list(backbone.example_inputs(3, 9).values())
    with torch.no_grad():
        expected = Deployed(backbone, head)(*inputs)
        torch.testing.assert_close(WithSide(backbone, side, head)(*inputs), expected)
    for parameter in side.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        assert not torch.allclose(WithSide(backbone, side, head)(*inputs), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "name"), [*(("side", name) for name in NAMES), ("mdpd", "dtlv1")]
)
def test_a_step_keeps_no_graph_of_blocks_up_to_m(method, name, backbone):
    """A real step: the side network's own graph holds the blocks behind M and no other."""
    config = check_config({"method": method, "side": {"name": name}})
    built = build_method(backbone, Classify.numbered(3), config)
    for parameter in built.side.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    built.train_mode()
    ran, phase = [], ["taps"]

    def watch(index):
        def hook(module, inputs, output):
            ran.append((phase[0], index, output.requires_grad))

        return hook

    def enter(name, owner, function):
        plain = getattr(owner, function)

        def entered(*rest, **more):
            phase[0] = name
            return plain(*rest, **more)

        setattr(owner, function, entered)

    for index, block in enumerate(backbone.blocks()):  # parts: a block that is skipped is entered
        part = block.mlp if backbone.family == "vit" else block.output
        part.register_forward_hook(watch(index))
    enter("side pass", built.side, "forward")
    if method == "mdpd":  # its backbone pass runs every block again, one at a time
        enter("backbone pass", built.engine, "backward")
    inputs = backbone.example_inputs(4, 9)
    labels = torch.arange(4) % 3
    built.step(Batch(inputs, labels, np.arange(4), 0, 4.0, 4.0))
    first = {"dtlv1": 2, "dtlv2": 3, "dtlv2-ls": 3}[name]  # M of 3 blocks
    assert built.side.last_tap == first
    taps = 3 if method == "mdpd" else first
    assert [index for when, index, _ in ran if when == "taps"] == list(range(taps))
    if method == "side":
        assert not any(graph for when, _, graph in ran if when == "taps")
    side_pass = [(index, graph) for when, index, graph in ran if when == "side pass"]
    assert side_pass == [(index, True) for index in range(first, 3)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.side.parameters())
    trained = built.backbone_weights
    assert all(p.grad is None for n, p in backbone.named_parameters() if n not in trained)


def test_every_part_gets_a_gradient_at_the_start(backbone):
    """c = 0 makes h = 0: the readings' up maps move first, the rest follows."""
    for name in NAMES:
        side = build_side(backbone, SideConfig(name=name))
        taps = [torch.randn(2, 17, 32) for _ in range(side.last_tap + 1)]
        side(taps, None, lambda index, x: x).tokens.square().sum().backward()
        assert all(read.c.weight.grad.abs().sum() > 0 for read in side.reads.values())


def test_mdpd_over_v1_has_no_feature_losses_unless_asked(backbone):
    def build(**more):
        config = {"side": {"name": "dtl"}, **more}
        return build_method(copy.deepcopy(backbone), Classify.numbered(3), check_config(config))

    plain = build()
    assert plain.config.side.name == "dtlv1"
    assert count(plain.modules["distiller"]) == 0
    asked = build(loss={"shallow": 1e-5})
    assert set(asked.distiller.phi) == {"1", "2"} and not asked.distiller.deep
    assert not hasattr(asked.distiller, "mask_token")


@pytest.mark.parametrize("name", ["dtlv2", "dtlv2-ls"])
def test_mdpd_over_v2_is_refused_with_the_reason(name, backbone):
    config = check_config({"side": {"name": name}})
    with pytest.raises(UserError, match="no side feature per layer"):
        build_method(backbone, Classify.numbered(3), config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtl_first": 4}, r"side\.dtl_first=4 does not fit a backbone of 3 blocks: give 1 to 3"),
        ({"dtl_adds": [0, 3]}, r"side\.dtl_adds=0,3 does not fit: blocks are numbered 1 to 3"),
        (
            {"dtl_first": 2, "dtl_adds": [3]},
            r"side\.dtl_first=2 does nothing beside side\.dtl_adds",
        ),
        ({"dtl_reads": [1, 3], "dtl_adds": [2]}, r"what block 3 is read for reaches no output"),
        ({"dtl_reads": [1, 4]}, r"side\.dtl_reads=1,4 does not fit: blocks are numbered 1 to 3"),
        ({"reduction": 2}, r"side\.reduction=2 is read by --side lst, sherl and unipt only"),
    ],
)
def test_what_does_not_fit_is_refused(options, said, backbone):
    with pytest.raises(UserError, match=said):
        build_side(backbone, SideConfig(name="dtlv2", **options))


def test_the_released_readout_averages_before_the_norm(tiny_vit, tiny_bert):
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit))).eval()
    norm = backbone.final_norm()
    assert isinstance(norm, nn.LayerNorm)
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    side = build_side(backbone, SideConfig(name="dtlv2", readout="released"))
    head = Head(backbone.width, 3)
    inputs = backbone.example_inputs(3)
    with torch.no_grad():
        found = WithSide(backbone, side, head)(*inputs.values())
        tokens = backbone.trace(inputs).taps[-1][:, backbone.prefix_tokens :]  # h = 0 at the start
        torch.testing.assert_close(found, head(norm(tokens.mean(1))))
        assert not torch.allclose(found, head(norm(tokens).mean(1)), atol=1e-3)
    posts = load_backbone(BackboneConfig(name=str(tiny_bert)), max_length=24)
    for other in (posts, load_backbone(BackboneConfig(name=str(tiny_vit), pooling="cls"))):
        with pytest.raises(UserError, match=r"side\.readout=released averages tokens before"):
            build_side(other, SideConfig(name="dtlv1", readout="released"))


def test_the_released_readout_reaches_the_kept_model_and_its_graph(tmp_path, image_options, fit_in):
    from onnxruntime import InferenceSession

    options = {**image_options, "method": "side", "side": "dtlv1", "steps": 2}
    run = fit_in(tmp_path / "run", options, set=["side.readout=released"])
    models = [Run.open(run.path).load_deployed(), run.load_with_side()[0]]
    inputs = run.load_backbone().example_inputs(2)
    session = InferenceSession(export_onnx(models[1], tmp_path / "side.onnx").path)
    (graph,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    with torch.no_grad():
        found = models[0](*inputs.values())
        torch.testing.assert_close(torch.from_numpy(graph), found, rtol=1e-4, atol=1e-5)
        models[1].side.readout = "model"
        assert not torch.allclose(models[1](*inputs.values()), found, atol=1e-3)
