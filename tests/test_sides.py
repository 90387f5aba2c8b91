"""Side networks against the numerical vectors and parameter budgets of the method specification.

Vectors are float64; fills: F(t, shape) = 0.5 sin(t + 0.7 i), X(l, shape) = sin(0.3 i + l).
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.config import BackboneConfig, SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides import SIDES, SideShape, build_side, other_side
from mdpd_deploy.sides.dtl import DTLv1, Fusion, Plain, ScaleShift, Swish, TokenConv
from mdpd_deploy.sides.lst import LST
from mdpd_deploy.sides.sherl import SHERL, Aggregation, GatedMap
from mdpd_deploy.sides.unipt import UniPT

VIT_B = SideShape((Layout(768),) * 13, text=False)


def fill(t: float, *shape: int) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return 0.5 * torch.sin(t + 0.7 * torch.arange(count, dtype=torch.float64)).reshape(shape)


def tap(layer: int, *shape: int) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.sin(0.3 * torch.arange(count, dtype=torch.float64) + layer).reshape(shape)


def set_linear(linear: nn.Linear, weight: float, bias: float | None, *, constant: float = 0.0):
    linear.weight.data = fill(weight, *linear.weight.shape)
    if linear.bias is not None:
        filled = fill(bias, *linear.bias.shape) if bias is not None else None
        linear.bias.data = torch.full_like(linear.bias, constant) if filled is None else filled


def close(found: Tensor, expected: list) -> None:
    torch.testing.assert_close(
        found.squeeze(0), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def no_block(index: int, x: Tensor) -> Tensor:
    raise AssertionError("this side network runs no backbone block")


def test_tv1a_unipt_reference():
    side = UniPT([4] * 3, 3, out_width=6).double()
    for index, down in enumerate(side.down):
        set_linear(down[0], 2 * index + 1, 2 * index + 2)
    set_linear(side.project[0], 21, 22)
    set_linear(side.up[1], 23, 24)
    set_linear(side.gate, 25, 26)
    taps = [tap(index, 1, 3, 4) for index in range(3)]
    mask = torch.tensor([[1, 1, 0]])
    down = [layer(x) for layer, x in zip(side.down, taps, strict=True)]
    close(side._confidence(down[-1], down[:-1], mask), [0.443112, 0.556888])
    close(
        side(taps, mask, no_block).tokens,
        [
            [-0.625297, 0.025346, 0.067247, 0.242065, 0.733718, 0.280891],
            [-1.403726, 0.967371, -0.105478, -0.525560, 1.681508, 0.091540],
            [-0.648165, -0.217238, 0.335051, 0.214250, 0.493999, 0.550749],
        ],
    )


def test_tv1b_unipt_paper():
    side = UniPT([4] * 3, 3, out_width=4, paper=True).double()
    for index, down in enumerate(side.down):
        set_linear(down, 2 * index + 1, 2 * index + 2)
    set_linear(side.gate, 25, None)
    set_linear(side.project[0], 31, None)
    set_linear(side.project[2], 32, None)
    set_linear(side.up, 33, 34)
    taps = [tap(index, 1, 3, 4) for index in range(3)]
    close(
        side(taps, torch.tensor([[1, 1, 0]]), no_block).tokens,
        [
            [0.295230, -0.190405, -0.283275, -0.471139],
            [0.209653, -0.405790, 0.019775, -0.561741],
            [0.322693, -0.606994, 0.109889, -0.451524],
        ],
    )


@pytest.mark.parametrize(
    ("paper", "weights", "expected"),
    [
        (
            False,
            [[0.447713, 0.200716, 0.351567], [0.214657, 0.500858, 0.284480]],
            [
                [0.256292, -0.488757, -0.520361, -0.738504],
                [-0.093225, -1.003707, -0.757244, -0.731546],
            ],
        ),
        (
            True,
            [[0, 0.999995, 0], [0.333474, 0.598956, 0.067563]],
            [
                [0.695826, -0.699373, -0.747237, -0.298812],
                [-0.073690, -1.024398, -0.755887, -0.712224],
            ],
        ),
    ],
)
def test_tv2_sherl_gated(paper, weights, expected):
    side = SHERL(4, 4, 3, gated=True, paper=paper).double()
    for index, layer in enumerate(side.maps):
        assert isinstance(layer, GatedMap)
        set_linear(layer.fc1, 10 * index + 1, None, constant=0.3)
        set_linear(layer.fc2, 10 * index + 3, 10 * index + 4)
        set_linear(layer.fc3, 10 * index + 5, 10 * index + 6)
    if side.aggregate.score is not None:
        set_linear(side.aggregate.score, 41, None, constant=0.1)
    set_linear(side.up[-1], 71, 72)
    side.alpha.data.fill_(0.05)
    taps = [tap(index, 1, 2, 4) for index in range(4)]
    mapped = [layer(x) for layer, x in zip(side.maps, taps, strict=True)]
    entry = side.late_input(mapped, taps[-1])
    shallow = torch.stack(mapped[:-1], dim=2)
    close(
        side.aggregate.redundancy(shallow),
        [[1.498239, 0.999997, 1.498239], [1.663869, 0.999997, 1.663865]],
    )
    close(side.aggregate.weights(shallow, mapped[-1]), weights)
    close(entry, expected)


def test_tv2c_sherl_vse():
    side = SHERL(4, 3, 3, gated=False, epsilon=1e-8).double().eval()
    for index, layer in enumerate(side.maps):
        set_linear(layer[0], 2 * index + 1, 2 * index + 2)
    set_linear(side.aggregate.score, 41, 42)
    set_linear(side.up[1], 43, 44)
    side.alpha.data.fill_(0.05)
    taps = [tap(index, 1, 2, 4) for index in range(3)]
    mapped = [layer(x) for layer, x in zip(side.maps, taps, strict=True)]
    entry = side.late_input(mapped, taps[-1])
    close(
        entry,
        [[-1.278817, 0.801299, 1.117337, 0.473769], [-0.363009, 0.757538, -1.772686, 0.528188]],
    )


def test_several_late_blocks_are_entered_anew_one_after_the_other():
    torch.manual_seed(0)
    side = SHERL(6, 4, 3, gated=True, late_layers=2).double().eval()
    side.alpha.data = torch.tensor([0.05, -0.02], dtype=torch.float64)
    taps = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3)]
    entered = []

    def block(index, x):
        entered.append((index, x))
        return torch.tanh(x) + index

    out = side(taps, None, block)
    mapped = [side.maps[index](taps[index]) for index in range(3)]
    first = side.late_input(mapped, taps[2], 0)
    mapped.append(side.maps[3](torch.tanh(first) + 2))  # the regulated output joins the set
    second = side.late_input(mapped, torch.tanh(first) + 2, 1)
    assert [index for index, _ in entered] == [2, 3] and side.last_tap == 2
    torch.testing.assert_close(entered[0][1], first)
    torch.testing.assert_close(entered[1][1], second)
    torch.testing.assert_close(out.tokens, torch.tanh(second) + 3)
    assert tuple(out.features) == side.feature_layers == (1, 2, 3)
    torch.testing.assert_close(out.features[3], mapped[3])
    one = SHERL(6, 4, 3, gated=True)
    assert count(side) == count(one) + 1  # an α more, nothing else


@pytest.mark.parametrize(("folder", "usual"), [("tiny_vit", 0.95), ("tiny_bert", 0.0)])
def test_the_gate_starts_open_beside_a_backbone_that_ends_in_a_norm(folder, usual, request):
    name = str(request.getfixturevalue(folder))
    backbone = load_backbone(BackboneConfig(name=name), max_length=24)
    for gate, expected in (
        (None, usual),
        ("closed", 0.0),
        ("open", 0.95),
        (0.0, 0.0),
        (-0.5, -0.5),
    ):
        config = SideConfig(name="sherl", reduction=2, late_layers=2, gate=gate)
        found = torch.tanh(build_side(backbone, config).alpha / 0.1)
        torch.testing.assert_close(found, torch.full((2,), expected))
    with pytest.raises(ValueError, match="less than 1"):
        SideConfig(name="sherl", gate=1.0)


@pytest.mark.parametrize("layers", [4, 9])
def test_more_late_blocks_than_fit_are_refused(layers):
    with pytest.raises(UserError, match=r"side\.late_layers=.* give 1 to 3"):
        SHERL(6, 4, 3, gated=True, late_layers=layers)


def test_tv3_the_ladder():
    seen = []

    def tanh(index, x, *, block):
        seen.append(x)
        return torch.tanh(x)

    norm = nn.RMSNorm(2, eps=1e-6)
    side = LST(4, 2, [nn.Identity(), nn.Identity()], out_width=4, bias=True, norm=norm)
    side = side.double()
    for index, linear in enumerate([side.first, *side.ladder, side.up[1]]):
        linear.weight.data = fill(2 * index + 1, *linear.weight.shape)
        linear.bias.data = fill(2 * index + 2, *linear.bias.shape)
    side.alpha.data = torch.tensor([0.05, -0.1], dtype=torch.float64)
    out = side([tap(layer, 1, 2, 4) for layer in range(3)], None, tanh)

    close(seen[0], [[-0.058710, -0.098522], [0.802228, -0.893490]])
    close(seen[1], [[-0.501021, 0.673100], [-0.076246, -0.080490]])
    close(
        out.tokens,
        [
            [0.755676, 0.134468, -0.315582, -0.227007],
            [-0.331995, -0.247887, 0.642113, 0.480902],
        ],
    )
    torch.testing.assert_close(out.features[2], torch.tanh(seen[1]))


def tanh_block(index: int, x: Tensor) -> Tensor:
    return x + 0.1 * torch.tanh(x)


@pytest.mark.parametrize(
    ("beta", "out", "state"),
    [
        (
            100,
            [
                [0.231291, 0.510300],
                [-0.075716, 0.594305],
                [0.245629, 0.866834],
                [1.196471, 1.190448],
                [1.450501, 0.898666],
            ],
            [
                [0.122295, 0.040682],
                [0.400408, 0.156117],
                [0.564379, 0.179654],
                [0.562476, 0.097406],
                [0.351277, -0.000591],
            ],
        ),
        (
            1,
            [
                [0.119559, 0.455748],
                [0.217171, 0.780955],
                [0.590132, 1.034211],
                [1.216105, 1.131584],
                [1.244369, 0.735955],
            ],
            None,
        ),
    ],
)
def test_tv4_v1(beta, out, state):
    layout = Layout(2, (2, 2), 1)
    conv = TokenConv(layout, 3)
    fusion = Plain(conv, Swish(beta))
    side = DTLv1(
        SideShape((layout,) * 4, text=False), [1, 2, 3], {2: 0, 3: 0}, [fusion], 1
    ).double()
    for index, read in enumerate(side.reads.values()):
        read.a.weight.data = fill(2 * index + 1, 1, 2)
        read.c.weight.data = fill(2 * index + 2, 2, 1)
    conv.conv.weight.data = fill(20, 2, 1, 3, 3)
    taps = [tap(0, 1, 5, 2)]
    for index in range(2):
        taps.append(tanh_block(index, taps[-1]))
    found = side(taps, None, tanh_block)
    close(found.tokens, out)
    if state:
        close(found.features[3], state)


@pytest.mark.parametrize(
    ("beta", "plain", "scaled"),
    [
        (
            100,
            [
                [0.176944, -0.166641],
                [-0.283101, -0.727350],
                [-0.712859, -1.016940],
                [-0.961357, -0.934458],
            ],
            [
                [0.709421, 0.180748],
                [0.152727, -0.633950],
                [-0.367315, -1.054717],
                [-0.668018, -0.934872],
            ],
        ),
        (
            1,
            [
                [0.161280, -0.162751],
                [-0.336704, -0.714041],
                [-0.766077, -1.003726],
                [-0.976514, -0.930694],
            ],
            [
                [0.690465, 0.186399],
                [0.087864, -0.614612],
                [-0.431713, -1.035517],
                [-0.686360, -0.929404],
            ],
        ),
    ],
)
def test_tv5_v2_and_ls(beta, plain, scaled):
    conv = TokenConv(Layout(2, (2, 2)), 3)
    fusion = Fusion(conv, Swish(beta), 1, 2).double()
    conv.conv.weight.data = fill(20, 2, 1, 3, 3)
    fusion.map.a.weight.data, fusion.map.c.weight.data = fill(11, 1, 2), fill(12, 2, 1)
    h = tap(3, 1, 4, 2)
    affine = ScaleShift(2).double()
    affine.scale.data, affine.shift.data = 1 + fill(13, 2), fill(14, 2)
    close(fusion(h, None), plain)
    close(affine(fusion(h, None)), scaled)


def test_a_silent_aggregation_returns_the_guide():
    aggregate = Aggregation(3, learned_score=True).double()
    set_linear(aggregate.score, 0, None)
    aggregate.score.weight.data.zero_()
    aggregate.score.bias.data.fill_(-1)
    guide = tap(1, 1, 2, 3)
    assert torch.equal(aggregate(tap(2, 1, 2, 4, 3), guide), guide)


def test_budget_unipt_bert():
    assert count(UniPT([768] * 13, 512, out_width=1024)) == 5_921_281


@pytest.mark.parametrize(("projection", "expected"), [("d-d", 4_293_505), ("auto", 4_736_641)])
def test_budget_unipt_vit(projection, expected):
    assert count(SIDES["unipt"].build(VIT_B, SideConfig(projection=projection))) == expected


def test_budget_sherl():
    assert count(GatedMap(768, 96)) == 92_448
    assert count(SIDES["sherl"].build(VIT_B, SideConfig(name="sherl"))) == 7_387_778
    eighth = SIDES["sherl"].build(VIT_B, SideConfig(name="sherl", reduction=8))
    assert count(eighth.up) == 74_496


def test_a_reduction_that_does_not_divide_is_refused_with_the_valid_ones():
    with pytest.raises(UserError, match=r"side.reduction=7 .* Valid values: 1, 2, 3, 4, 6, 8"):
        SIDES["unipt"].build(VIT_B, SideConfig(reduction=7))


VARIANTS = [(name, "reference") for name in sorted(SIDES)] + [
    ("unipt", "paper"),
    ("sherl", "paper"),
]


def texts_of(mask):
    """Return inputs with this token mask."""
    return {"input_ids": torch.full(mask.shape, 4), "attention_mask": mask}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_padding_changes_nothing_on_real_tokens(name, variant, tiny_bert):
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert)), max_length=24).double()
    torch.manual_seed(0)
    config = other_side(SideConfig(variant=variant, reduction=2), name)
    side = build_side(backbone, config).double().eval()
    for parameter in side.parameters():  # also what starts at 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    taps = [torch.randn(2, 5, 32, dtype=torch.float64) for _ in range(side.last_tap + 1)]
    padded = [torch.cat([x, torch.randn(2, 3, 32, dtype=torch.float64)], dim=1) for x in taps]
    mask = torch.ones(2, 5)
    longer = torch.cat([mask, torch.zeros(2, 3)], dim=1)
    plain, other = (
        side(some, shown, partial(backbone.run_block, backbone.trace(texts_of(shown))))
        for some, shown in ((taps, mask), (padded, longer))
    )
    torch.testing.assert_close(other.tokens[:, :5], plain.tokens)
    assert tuple(plain.features) == side.feature_layers
    for layer, feature in plain.features.items():
        torch.testing.assert_close(other.features[layer][:, :5], feature)
        assert feature.shape[-1] == side.width
