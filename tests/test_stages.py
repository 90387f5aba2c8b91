"""Networks in stages: what their taps are, and every method and side network beside them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.layout import Layout, cells
from mdpd_deploy.config import BackboneConfig, SideConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.model import Deployed, WithSide
from mdpd_deploy.sides import build_side
from mdpd_deploy.sides.dtl import Bridge
from mdpd_deploy.sides.maps import TokenBatchNorm
from mdpd_deploy.sides.unipt_maps import PreInteraction
from mdpd_deploy.tasks import Classify
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.methods import Batch, build_method

NAMES = ["swin", "swinv2", "convnext", "resnet", "efficientnet"]
# entries: blocks behind a merge; norms: tuned ones in blocks and merges, and behind the last block
SHAPES = {
    "swin": ([1, 3, 7], 9 * 2 + 3, 1),
    "swinv2": ([1, 3, 7], 9 * 2 + 3, 1),
    "convnext": ([1, 3, 7], 9 + 3, 1),
    "resnet": ([], None, 0),
    "efficientnet": ([], None, 1),
}
DTL = ("dtlv1", "dtlv2", "dtlv2-ls")


def fill(t, *shape):
    values = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return 0.5 * torch.sin(t + 0.7 * values).reshape(shape)


def tap(layer, *shape):
    values = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.sin(0.3 * values + layer).reshape(shape)


def count(module):
    return sum(p.numel() for p in module.parameters())


def fits(name, side):
    return not (name == "efficientnet" and side == "dtlv1")  # its stages have one block each


PAIRS = [(name, side) for name in NAMES for side in ("unipt", "sherl", *DTL) if fits(name, side)]


def shaken(module, by=0.05):
    for parameter in module.parameters():
        parameter.data += by * torch.randn(parameter.shape)
    return module


@pytest.fixture(scope="module")
def backbones(staged_folder):
    def load(name):
        torch.manual_seed(0)
        return shaken(load_backbone(BackboneConfig(name=str(staged_folder(name)))))

    return {name: load(name) for name in NAMES}


@pytest.fixture(params=NAMES)
def backbone(request, backbones):
    return copy.deepcopy(backbones[request.param])


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, backbones):
    name, side = request.param
    return copy.deepcopy(backbones[name]), side


def make(backbone, method="mdpd", side=None, **sections):
    config = {"method": method, **({"side": {"name": side}} if side else {}), **sections}
    torch.manual_seed(0)
    built = build_method(copy.deepcopy(backbone), Classify.numbered(3), check_config(config))
    built.train_mode()
    return built


def batch_of(backbone, size=4):
    inputs = backbone.example_inputs(size)
    return Batch(inputs, torch.arange(size) % 3, np.arange(size), 1, float(size), float(size))


def gradients(method, batch, seed=5):
    torch.manual_seed(seed)
    method.step(batch)
    groups = method.groups.values()
    return {name: p.grad for group in groups for name, p in group.items()}


def moves(name, gradient):
    """Tell whether a gradient is not 0; a softmax takes no notice of UniPT's gate's bias."""
    return bool(gradient.abs().sum() > 0) or name == "side.gate.bias"


# --- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["BND", "BHWC", "BCHW"])
def test_a_layout_lays_a_map_out_row_by_row_and_back(axes):
    layout = Layout(4, (2, 3), axes=axes)
    picture = torch.randn(2, 4, 2, 3)
    tokens = torch.stack([picture[:, :, i, j] for i in range(2) for j in range(3)], dim=1)
    state = {"BND": tokens, "BHWC": picture.movedim(1, -1), "BCHW": picture}[axes]
    assert torch.equal(layout.tokens(state), tokens)
    assert torch.equal(layout.state(tokens), state)


def test_the_tokens_of_a_cell_are_those_of_average_pooling():
    layout = Layout(3, (6, 4), axes="BCHW")
    picture = torch.randn(2, 3, 6, 4)
    grouped = cells(layout.tokens(picture), (6, 4), (3, 2))
    assert grouped.shape == (2, 6, 4, 3)
    pooled = nn.functional.avg_pool2d(picture, 2)
    torch.testing.assert_close(grouped.mean(2), pooled.flatten(2).transpose(1, 2))


def test_taps_are_tokens_of_the_layouts_and_blocks_run_again_alike(backbone):
    inputs = backbone.example_inputs(2)
    with torch.no_grad():
        expected = backbone(inputs)
        trace = backbone.trace(inputs)
        for index, (tap_, layout) in enumerate(zip(trace.taps, backbone.layouts, strict=True)):
            rows, columns = layout.grid
            assert tap_.shape == (2, rows * columns, layout.width)
            if index < backbone.depth:
                entered = backbone.enter(trace, index, tap_)
                torch.testing.assert_close(
                    backbone.enter(trace, index, tap_.clone(), blocked=True), entered
                )
                again = backbone.run_block(trace, index, entered, blocked=True)
                torch.testing.assert_close(again, trace.taps[index + 1], rtol=1e-4, atol=1e-5)
        for top in (trace.taps[-1], trace.ends[-1]):
            close = dict(rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(backbone.finish(top, None), expected, **close)
            torch.testing.assert_close(backbone.finish(top, None, blocked=True), expected, **close)
        partly = backbone.trace(inputs, last=3)
    assert len(partly.taps) == 4
    torch.testing.assert_close(partly.taps[3], trace.taps[3])


def test_weights_held_in_bfloat16_leave_the_same_norms_to_train(backbone):
    plain, held = (
        make(backbone, "norms", train={"precision": precision}).groups
        for precision in ("fp32", "bf16")
    )
    assert held["norms"].keys() == plain["norms"].keys()
    assert {p.dtype for p in held["norms"].values()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_tuned_norms_are_those_of_blocks_merges_and_tail(name, backbones):
    backbone = backbones[name]
    merges, inside, behind = SHAPES[name]
    assert list(backbone.merges()) == merges
    blocks = [backbone.block_norms(index) for index in range(backbone.depth)]
    assert len(backbone.final_norm_parameters()) == 2 * behind
    assert not any("stem" in path or path.startswith("model.bn1") for path in backbone.norms())
    if inside is None:
        stem = ("model.conv1.", "model.bn1", "model.bn2")
        named = backbone.named_modules()
        kept = [n for n, m in named if isinstance(m, nn.BatchNorm2d) and not n.startswith(stem)]
        inside = len(kept)
    assert sum(len(norms) for norms in blocks) == 2 * inside
    assert all(len(blocks[index]) > 2 for index in merges)


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((name, None) for name in NAMES),
        ("swin", "unipt"), ("swinv2", "dtlv1"), ("convnext", "sherl"), ("resnet", "dtlv1"),
        ("efficientnet", "sherl"),
    ],
)  # fmt: skip
def test_every_gradient_is_that_of_plain_back_propagation(name, side, backbones):
    backbone = backbones[name]
    method = "mdpd" if side else "norms"
    batch = batch_of(backbone)
    found = {}
    for mode in ("full", "recompute", "late:1"):
        more = {"loss": {"logits": 0.1}} if side else {}
        built = make(backbone, method, side, train={"norm_grad": mode}, **more)
        shaken(built.modules)
        found[mode] = gradients(built, batch)
        trained = {id(p) for group in built.groups.values() for p in group.values()}
        others = [p for p in built.backbone.parameters() if id(p) not in trained]
        assert all(p.grad is None for p in others)
        buffers = dict(backbone.named_buffers())
        assert all(torch.equal(b, buffers[n]) for n, b in built.backbone.named_buffers())
    full, exact, late = found.values()
    assert full.keys() == exact.keys() and late.keys() < exact.keys()
    assert [n for n, g in full.items() if g is None or not moves(n, g)] == []
    for other in (exact, late):
        for key, gradient in other.items():
            torch.testing.assert_close(gradient, full[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("side", ["unipt", "sherl"])
def test_local_gradients_reach_the_norms_of_merges_too(backbone, side):
    built = make(backbone, "mdpd", side, train={"norm_grad": "local"})
    found = gradients(built, batch_of(backbone))
    assert all(gradient is not None for gradient in found.values())
    for index in backbone.merges():
        if index + 1 in built.side.feature_layers:
            assert {f"backbone.{n}" for n in backbone.block_norms(index)} <= found.keys()


def test_the_side_pass_moves_no_backbone_tensor_and_the_backbone_pass_no_side_tensor(backbone):
    built = make(backbone, "mdpd", "sherl")
    batch = batch_of(backbone)
    trace = built.engine.forward(batch.inputs)
    hidden = built.distiller.draw_mask(batch.keys, built.distiller.mask_tokens(trace.taps), 0, 1)
    _, teacher, features = built._side_pass(batch, trace, hidden)
    frozen = [*built.backbone.parameters(), *built.modules["head"].parameters()]
    assert all(p.grad is None for p in frozen)
    for group in built.groups.values():
        for parameter in group.values():
            parameter.grad = None
    built._backbone_pass(batch, trace, hidden, teacher, features)
    assert all(p.grad is None for p in built.groups["side"].values())
    assert all(p.grad is not None for p in built.groups["norms"].values())


# --- side networks -----------------------------------------------------------------------------------


def test_a_step_beside_a_network_in_stages_gives_every_part_a_gradient(pair):
    backbone, side = pair
    built = make(backbone, "side", side)
    shaken(built.modules)
    found = gradients(built, batch_of(backbone))
    assert [n for n, g in found.items() if g is None or not moves(n, g)] == []
    assert all(p.grad is None for p in built.backbone.parameters())


@pytest.mark.parametrize(("name", "side"), [pair for pair in PAIRS if pair[1] in DTL])
def test_a_fresh_dtl_leaves_the_logits_as_they_are(name, side, backbones):
    backbone = copy.deepcopy(backbones[name])
    head = Head(backbone.width, 3)
    nn.init.normal_(head.linear.weight)
    beside = build_side(backbone, SideConfig(name=side))
    inputs = list(backbone.example_inputs(2).values())
    with torch.no_grad():
        expected = Deployed(backbone, head)(*inputs)
        answer = WithSide(backbone, beside, head)(*inputs)
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
        shaken(beside, 0.2)
        assert (WithSide(backbone, beside, head)(*inputs) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "budget"),
    [
        ("swin_base_patch4_window7_224", {"name": "dtlv1", "rank": 4}, 128_512),  # 0.13 M
        ("convnext_base", {"name": "dtlv1", "rank": 4}, 173_568),  # 0.17 M
        # detection on COCO: 5.8, 3.9 and 2.9 M
        ("swin_base_patch4_window7_224", {"name": "dtlv1", "rank": 256, "kernel": 3}, 5_780_992),
        ("swin_base_patch4_window7_224", {"name": "dtlv2", "rank": 256, "kernel": 3}, 3_927_552),
        ("swin_base_patch4_window7_224", {"name": "dtlv2-ls", "rank": 256, "kernel": 3}, 2_862_592),
    ],
)
def test_dtl_budgets(name, options, budget):
    config = BackboneConfig(name=f"timm:{name}", pretrained=False)
    side = build_side(load_backbone(config, fake=True), SideConfig(**options))
    assert count(side) == budget
    if options["name"] == "dtlv2":  # as the paper lists them
        assert list(side.reads) == ["2", "4", "5", "9", "13", "17", "22", "24"]
        assert list(side.adds) == [13, 15, 17, 19, 22, 24]
    if options["name"] == "dtlv2-ls":
        assert list(side.affine) == ["15", "19"]
    if options["name"] == "dtlv1" and "swin" in name:
        assert list(side.reads) == [str(block) for block in range(5, 25)]


def test_unipt_of_resnext_has_the_reported_size():
    """6.4 M in the paper: 6,433,537 with an output of 1024, here of the last stage's 2048."""
    config = BackboneConfig(name="timm:resnext101_32x8d", pretrained=False, img_size=512)
    side = build_side(load_backbone(config, fake=True), SideConfig(reduction=4))
    assert count(side) - count(side.up) + 512 * 1024 + 1024 == 6_433_537
    assert [layer.grid for layer in side.before] == [(128, 128), (64, 64), (32, 32)]
    assert side.feature_layers == (3, 7, 30, 33)
    assert sum(isinstance(m, TokenBatchNorm) for m in side.modules()) == 5


def test_tv6_the_cells_of_unipt():
    unit = PreInteraction(Layout(2, (4, 4)), Layout(3, (2, 2))).double()
    unit.query.weight.data, unit.query.bias.data = fill(1, 2, 3), fill(2, 2)
    flat = lambda x: x.flatten(2).transpose(1, 2)
    x, guide = flat(tap(1, 1, 2, 4, 4)), flat(tap(2, 1, 3, 2, 2))
    grouped = cells(x, (4, 4), (2, 2))
    weights = unit.weights(grouped, guide).unflatten(2, (2, 2)).unflatten(1, (2, 2))
    expected = [
        [0.285442, 0.405431, 0.383158, 0.467785],
        [0.646268, 0.662860, 0.583913, 0.565144],
        [0.795905, 0.704095, 0.897021, 0.602979],
        [0.25, 0.25, 0.25, 0.25],
    ]
    found = weights[0].transpose(1, 2).reshape(4, 4)
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-5, rtol=0)
    target = [[1.550055, 1.044763, -1.070477, -1.628545], [0.781838, 1.363766, 1.249197, 0.389166]]
    torch.testing.assert_close(
        unit(x, guide)[0].T, torch.tensor(target).double(), atol=1e-5, rtol=0
    )


def test_tv5_the_bridge():
    bridge = Bridge(Layout(4, (2, 2)), Layout(8, (1, 1))).double()
    bridge.conv.weight.data = fill(15, 8, 4, 2, 2)
    assert bridge.conv.groups == 1
    out = bridge(tap(1, 1, 4, 2, 2).flatten(2).transpose(1, 2))
    expected = [0.052150, 0.583934, 0.184933, -0.508849, -0.391531, 0.349884, 0.533587, -0.133243]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected).double(), atol=1e-5, rtol=0)
    assert Bridge(Layout(128, (56, 56)), Layout(256, (28, 28))).conv.groups == 32
    assert Bridge(Layout(8, (7, 7)), Layout(16, (4, 4)))(torch.ones(1, 49, 8)).shape == (1, 16, 16)
    assert Bridge(Layout(8, (7, 7)), Layout(16, (3, 3)))(torch.ones(1, 49, 8)).shape == (1, 9, 16)
    assert Bridge(Layout(16, (4, 4)), Layout(24, (4, 4))).conv.kernel_size == (1, 1)


def test_sherl_pools_stages_and_enters_the_last_block(backbone):
    side = build_side(backbone, SideConfig(name="sherl")).eval()
    trace = backbone.trace(backbone.example_inputs(2))
    last = backbone.depth - 1
    seen = []

    class Blocks:
        enter = staticmethod(lambda index, x: backbone.enter(trace, index, x))

        def __call__(self, index, x):
            seen.append(index)
            return backbone.run_block(trace, index, x)

    with torch.no_grad():
        side.alpha.fill_(0.3)  # tanh(0.3 / 0.1) = 0.995
        for parameter in side.up.parameters():
            parameter.zero_()
        out = side(trace.taps, None, Blocks())
    assert seen == [last] and side.last_tap == last
    entered = backbone.enter(trace, last, trace.taps[last])
    with torch.no_grad():
        expected = backbone.run_block(trace, last, torch.tanh(torch.tensor(3.0)) * entered)
    torch.testing.assert_close(out.tokens, expected)
    first = backbone.layouts[side.layers[0]]
    picture = trace.taps[side.layers[0]].transpose(1, 2).unflatten(2, first.grid)
    rate = first.grid[0] // backbone.entries[last].grid[0]
    pooled = nn.functional.max_pool2d(picture, rate) + nn.functional.avg_pool2d(picture, rate)
    torch.testing.assert_close(
        side.pool(trace.taps[side.layers[0]], first), pooled.flatten(2).transpose(1, 2)
    )


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_the_shallow_half_is_imitated_on_the_side_networks_grid(name, backbones):
    """The target is the mean of each cell; φ and G have the width of their layer."""
    built = make(backbones[name], "mdpd", "unipt")
    backbone, distiller = built.backbone, built.distiller
    assert distiller.shallow == built.side.feature_layers[:2]
    assert distiller.deep == built.side.feature_layers[2:]
    trace = backbone.trace(backbone.example_inputs(2))
    layer = distiller.shallow[0]
    layout, n = backbone.layouts[layer], trace.taps[-1].shape[1]
    target = distiller.target(layer, trace.taps[layer])
    picture = trace.taps[layer].transpose(1, 2).unflatten(2, layout.grid)
    pooled = nn.functional.adaptive_avg_pool2d(picture, backbone.grid)
    torch.testing.assert_close(target, pooled.flatten(2).transpose(1, 2))
    feature = torch.randn(2, n, built.side.width)
    found = distiller.layer_loss(layer, feature, trace.taps[layer], torch.ones(2, n), None)
    by_hand = (distiller.phi[str(layer)](feature) - target).square().sum()
    torch.testing.assert_close(found, by_hand)
    for deep in distiller.deep:
        assert distiller.gen[str(deep)].first.weight.shape[0] == backbone.layouts[deep].width


def test_one_mask_is_shared_by_deep_layers_of_other_grids(backbones):
    more = {"loss": {"shallow": 1e-5, "deep": 1e-5}, "distill": {"shallow_layers": 1}}
    built = make(backbones["swin"], "mdpd", "dtlv1", **more)
    distiller = built.distiller
    grids = [built.backbone.layouts[layer].grid for layer in distiller.deep]
    assert {(4, 4), (2, 2)} == set(grids) and distiller.mask_tokens([]) == 4
    hidden = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    fine = distiller.deep[grids.index((4, 4))]
    spread = distiller._spread(fine, hidden).unflatten(1, (4, 4))
    assert torch.equal(spread[0], torch.kron(hidden.view(2, 2), torch.ones(2, 2)))
    assert sorted(distiller.mask_token) == ["128", "64"]
    found = gradients(built, batch_of(built.backbone))
    assert all(gradient is not None for gradient in found.values())


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "side", "said"),
    [
        ("swin", "side", "lst", "works in stages of growing width: use unipt"),
        ("resnet", "lora", None, "is made of convolutions: use --method norms"),
        ("convnext", "ia3", None, "is made of convolutions: use --method norms"),
        ("swin", "prompt", None, "tokens"),
        ("resnet", "prefix", None, "keys and values"),
        ("efficientnet", "side", "dtlv1", "begins again in every stage"),
        ("swin", "mdpd", "dtlv2", "no side feature per layer"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(name, method, side, said, backbones):
    with pytest.raises(UserError, match=said):
        make(backbones[name], method, side)


def test_sizes_that_do_not_fit_are_refused(staged_folder):
    def load(name, size):
        return load_backbone(BackboneConfig(name=str(staged_folder(name)), img_size=size))

    with pytest.raises(UserError, match=r"img_size=66 is no multiple of the patch size 4"):
        load("swin", 66)
    odd = load("resnet", 80)  # 20, 10, 5, 3
    for side in ("unipt", "sherl"):
        with pytest.raises(UserError, match=r"3×3 does not divide 20×20: choose .* of 32"):
            build_side(odd, SideConfig(name=side))
    with pytest.raises(UserError, match=r"late_layers=2: .* its last block only"):
        build_side(load("resnet", 64), SideConfig(name="sherl", late_layers=2))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_adapters_reach_the_maps_of_windowed_blocks(name, backbones):
    built = make(backbones[name], "lora")
    batch = batch_of(built.backbone)
    found = gradients(built, batch)
    named = [n for n in found if "lora_B" in n]
    assert len(named) == built.backbone.depth
    assert all(found[n].abs().sum() > 0 for n in named)


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "side"),
    [
        ("swin", "side", "dtlv2"),
        ("convnext", "mdpd", "unipt"),
        ("resnet", "mdpd", "sherl"),
    ],
)
def test_a_forecast_is_what_a_step_takes(name, method, side, staged_folder, real_peak):
    config = check_config(
        {
            "method": method,
            "backbone": {"name": str(staged_folder(name))},
            "train": {"batch": 4},
            **({"side": {"name": side}} if side else {}),
        }
    )
    foreseen = forecast(config, Classify.numbered(3))
    assert foreseen.peak_bytes == pytest.approx(real_peak(config).peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "most"), [("swin_base_patch4_window7_224", 1.45e9), ("convnext_base", 1.30e9)]
)
def test_norms_of_large_networks_need_little(name, most):
    """Kept whole, the graph of batch 32 at 224 × 224 takes 4.8 and 4.2 GB."""
    config = check_config(
        {
            "method": "norms",
            "backbone": {"name": f"timm:{name}", "pretrained": False},
            "train": {"batch": 32},
        }
    )
    assert forecast(config, Classify.numbered(100)).peak_bytes <= most
