"""DTL: its parameter budgets, its patterns, and what its graph leaves out."""

import copy

import pytest
import torch
from torch import nn

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, SideConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.model import Deployed, WithSide
from mdpd_deploy.sides import SIDES, SideShape, build_side
from mdpd_deploy.sides.dtl import (
    default_adds,
    default_reads,
    shared_state,
)
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.methods import TaskSpec, build_method

NAMES = ["dtlv1", "dtlv2", "dtlv2-ls"]
VIT_B = SideShape("vit", 768, 12, text=False, grid=(14, 14), prefix=1)
VIT_G = SideShape("vit", 1536, 40, text=False, grid=(16, 16), prefix=1)


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
    ],
)
def test_budgets(shape, options, budget):
    assert count(SIDES[options["name"]](shape, SideConfig(**options))) == budget


def test_default_patterns():
    assert default_reads(12) == [1, 5, 9, 12] and default_adds(7, 12) == [7, 9, 12]
    assert default_reads(6) == [1, 5, 6] and default_adds(4, 6) == [4, 6]
    # Swin's third stage as the paper lists it: blocks 13, 15, 17, 19 and 22 with readings at 13, 17
    assert shared_state([5, 9, 13, 17, 22], [13, 15, 17, 19, 22]) == [15, 19]


def test_blocks_that_read_one_state_share_it_scaled_and_shifted():
    config = SideConfig(name="dtlv2-ls", dtl_reads=[1, 7], dtl_adds=[7, 8, 9])
    side = SIDES["dtlv2-ls"](VIT_B, config)
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


@pytest.mark.parametrize("name", NAMES)
def test_blocks_up_to_m_never_enter_the_graph(name, backbone):
    """Only blocks behind M run again, on a detached tap; with the readings frozen nothing flows."""
    side = build_side(backbone, SideConfig(name=name))
    for parameter in side.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = backbone.example_inputs(2, 9)
    mask = backbone.token_mask(inputs)
    taps = [backbone.embed(inputs).detach()]
    for index in range(side.last_tap):
        taps.append(backbone.run_block(index, taps[-1], mask).detach())
    ran = []

    def run(index, x):
        ran.append((index, x.requires_grad))
        return backbone.run_block(index, x, mask, blocked=True)

    side(taps, mask, run).tokens.square().sum().backward()
    first = {"dtlv1": 2, "dtlv2": 3, "dtlv2-ls": 3}[name]  # of 3 blocks
    assert side.last_tap == first
    assert ran == [(index, True) for index in range(first, 3)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in side.parameters())
    norms = backbone.norms().values()
    assert all(p.grad is None for p in norms)


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
        return build_method(copy.deepcopy(backbone), TaskSpec("classify", 3), check_config(config))

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
        build_method(backbone, TaskSpec("classify", 3), config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtl_first": 4}, r"side\.dtl_first=4 does not fit a backbone of 3 blocks: give 1 to 3"),
        ({"dtl_adds": [1, 3]}, r"side\.dtl_adds=1,3 does not fit: blocks are numbered 2 to 3"),
        ({"dtl_reads": [1, 4]}, r"side\.dtl_reads=1,4 does not fit: blocks are numbered 1 to 3"),
        ({"reduction": 2}, r"side\.reduction=2 is read by --side unipt, sherl and lst only"),
    ],
)
def test_what_does_not_fit_is_refused(options, said, backbone):
    with pytest.raises(UserError, match=said):
        build_side(backbone, SideConfig(name="dtlv2", **options))
