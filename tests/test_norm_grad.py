"""The norm-gradient engine: `recompute` is exact, each mode trains what it says, nothing leaks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides import SIDES, other_side
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.methods import METHODS, Batch, build_method
from mdpd_deploy.train.norm_grad import build_norm_gradient

TEACHERS = [name for name, side in sorted(SIDES.items()) if side.has_features]


@pytest.fixture(params=["vit", "bert"])
def backbone(request, tiny_vit, tiny_bert):
    name = tiny_vit if request.param == "vit" else tiny_bert
    loaded = load_backbone(BackboneConfig(name=str(name)), max_length=24)
    for parameter in loaded.parameters():  # random biases too, so that no gradient is 0 by symmetry
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    return loaded


def make(backbone, method="mdpd", side="unipt", *sets, task=None):
    config = load_config(None, {"method": method}, list(sets))
    if method in ("mdpd", "side"):
        beside = other_side(config.side.model_copy(update={"reduction": 2}), side)
        config = config.model_copy(update={"side": beside})
    torch.manual_seed(0)
    built = build_method(copy.deepcopy(backbone), task or Classify.numbered(3), config)
    built.train_mode()
    return built


def batch_for(backbone, size=4, labels=None):
    torch.manual_seed(3)
    inputs = backbone.example_inputs(size, 9)
    labels = torch.arange(size) % 3 if labels is None else labels
    return Batch(inputs, labels, np.arange(size), 1, float(size), float(size))


def gradients(method, batch, seed=5):
    torch.manual_seed(seed)
    losses = method.step(batch)
    found = {
        name: None if p.grad is None else p.grad.clone()
        for group in method.groups.values()
        for name, p in group.items()
    }
    return found, losses


@pytest.mark.parametrize("side", [*TEACHERS, "none"])
@pytest.mark.parametrize("dropout", [True, False])
def test_recompute_equals_full_for_every_trained_tensor(backbone, side, dropout):
    if dropout and backbone.grid is None:
        assert any(m.p > 0 for m in backbone.modules() if isinstance(m, torch.nn.Dropout))
    method = "norms" if side == "none" else "mdpd"
    sets = [f"backbone.dropout_active={str(dropout).lower()}"]
    sets += ["loss.logits=0.1"] if method == "mdpd" else []
    batch = batch_for(backbone)
    exact, full_losses = gradients(
        make(backbone, method, side, "train.norm_grad=full", *sets), batch
    )
    walked, losses = gradients(
        make(backbone, method, side, "train.norm_grad=recompute", *sets), batch
    )
    assert set(exact) == set(walked) and len(exact) > 10
    for name, gradient in exact.items():
        torch.testing.assert_close(walked[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in full_losses.items():
        torch.testing.assert_close(losses[name], value)


@pytest.mark.parametrize("side", ["unipt", "none"])
def test_halves_run_again_give_the_very_gradient_of_plain_back_propagation(backbone, side):
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
        elif "drop_path1" in dict(module.named_children()):
            module.drop_path1, module.drop_path2 = DropPath(0.3), DropPath(0.3)
    method = "norms" if side == "none" else "mdpd"
    batch = batch_for(backbone)
    plain, _ = gradients(make(backbone, method, side, "train.norm_grad=full"), batch)
    halved, _ = gradients(make(backbone, method, side, "train.norm_grad=recompute-halves"), batch)
    assert plain.keys() == halved.keys()
    assert all(torch.equal(halved[name], gradient) for name, gradient in plain.items())
    other, _ = gradients(
        make(backbone, method, side, "train.norm_grad=recompute-halves"), batch, seed=6
    )
    assert any(not torch.equal(halved[name], other[name]) for name in plain)  # dropout is on


def test_dropout_is_replayed_not_drawn_again(backbone):
    """With dropout on, a walk that drew anew would give another gradient for another seed."""
    if backbone.grid is not None:
        for module in backbone.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
    batch = batch_for(backbone)
    one, _ = gradients(make(backbone, "norms"), batch, seed=5)
    other, _ = gradients(make(backbone, "norms"), batch, seed=6)
    assert any(not torch.allclose(one[name], other[name]) for name in one)
    full, _ = gradients(make(backbone, "norms", "unipt", "train.norm_grad=full"), batch, seed=5)
    for name in one:
        torch.testing.assert_close(one[name], full[name], rtol=1e-4, atol=1e-6)


def test_the_walk_leaves_the_random_state_as_the_forward_left_it(backbone):
    engine = build_norm_gradient("recompute", backbone)
    backbone.train()
    batch = batch_for(backbone)
    torch.manual_seed(0)
    for parameter in engine.trained(()).values():
        parameter.requires_grad_(True)
    trace = engine.forward(batch.inputs)
    before = torch.get_rng_state()
    engine.backward(trace, lambda top: top.square().sum(), None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "mode", ["recompute", "recompute-halves", "full", "late:1", "late:2", "local", "none"]
)
@pytest.mark.parametrize("side", TEACHERS)
def test_every_declared_tensor_has_a_gradient_and_no_other_has(backbone, side, mode):
    method = make(backbone, "mdpd", side, f"train.norm_grad={mode}")
    found, _ = gradients(method, batch_for(backbone))
    assert [name for name, gradient in found.items() if gradient is None] == []
    trained = {id(p) for group in method.groups.values() for p in group.values()}
    others = [n for n, p in method.backbone.named_parameters() if id(p) not in trained]
    assert all(method.backbone.get_parameter(name).grad is None for name in others)
    blocks = {"late:1": 1, "late:2": 2, "none": 0}.get(mode, 3)
    if (side, mode) == ("dtlv1", "local"):
        blocks = 1  # no feature losses over DTL: only the last block has a loss of its own
    if mode == "none":
        assert method.backbone_weights == {}
    else:
        per_block = len(method.backbone.block_norms(0))
        assert len(method.backbone_weights) == blocks * per_block + len(
            method.backbone.final_norm_parameters()
        )


@pytest.mark.parametrize("side", TEACHERS)
def test_the_side_pass_moves_no_backbone_tensor_and_the_backbone_pass_no_side_tensor(
    backbone, side
):
    method = make(backbone, "mdpd", side)
    batch = batch_for(backbone)
    trace = method.engine.forward(batch.inputs)
    hidden = method.distiller.draw_mask(batch.keys, trace.taps[0].shape[1], 0, 1)
    _, teacher, features = method._side_pass(batch, trace, hidden)
    backbone_tensors = [*method.backbone.parameters(), *method.modules["head"].parameters()]
    assert all(p.grad is None for p in backbone_tensors)
    for group in method.groups.values():
        for parameter in group.values():
            parameter.grad = None
    method._backbone_pass(batch, trace, hidden, teacher, features)
    assert all(p.grad is None for p in method.groups["side"].values())
    assert all(p.grad is not None for p in method.groups["norms"].values())


def test_late_norm_grad_is_the_literal_joint_gradient(backbone):
    """Only SHERL runs a block inside its graph: the sum then differs from the blocked one."""
    batch = batch_for(backbone)
    blocked, _ = gradients(make(backbone, "mdpd", "sherl"), batch)
    joint, _ = gradients(make(backbone, "mdpd", "sherl", "train.late_norm_grad=true"), batch)
    last = next(iter(backbone.block_norms(backbone.depth - 1)))
    first = next(iter(backbone.block_norms(0)))
    assert not torch.allclose(blocked[f"backbone.{last}"], joint[f"backbone.{last}"])
    torch.testing.assert_close(blocked[f"backbone.{first}"], joint[f"backbone.{first}"])


def test_local_gradients_come_from_the_layers_own_feature_loss(backbone):
    """Scaling the feature losses scales local norm gradients, and not the head's."""
    batch = batch_for(backbone)
    small = ["train.norm_grad=local", "loss.deep=1e-3", "loss.shallow=1e-3"]
    large = ["train.norm_grad=local", "loss.deep=2e-3", "loss.shallow=2e-3"]
    one, _ = gradients(make(backbone, "mdpd", "unipt", *small), batch)
    two, _ = gradients(make(backbone, "mdpd", "unipt", *large), batch)
    name = f"backbone.{next(iter(backbone.block_norms(0)))}"
    torch.testing.assert_close(two[name], 2 * one[name])
    torch.testing.assert_close(two["head.linear.weight"], one["head.linear.weight"])


def test_the_side_network_may_learn_before_it_teaches(backbone):
    """Before `logits_after` the gradients are those without a logits loss, then those with it."""
    never, _ = gradients(make(backbone, "mdpd", "unipt", "loss.logits=0"), batch_for(backbone))
    always, _ = gradients(make(backbone, "mdpd", "unipt", "loss.logits=1"), batch_for(backbone))
    sets = ("loss.logits=1", "loss.logits_after=0.5")
    for progress, expected in ((0.0, never), (0.49, never), (0.5, always)):
        batch = replace(batch_for(backbone), progress=progress)
        found, losses = gradients(make(backbone, "mdpd", "unipt", *sets), batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert float(losses["loss_logits"]) > 0  # shown all the same
    assert any(not torch.equal(never[name], always[name]) for name in never)


def test_padding_changes_no_gradient(tiny_bert):
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert)), max_length=24)
    sets = ["backbone.dropout_active=false", "loss.logits=0.1"]
    batch = batch_for(backbone)
    pad = {
        name: torch.cat([x, torch.zeros(len(x), 4, dtype=x.dtype)], dim=1)
        for name, x in batch.inputs.items()
    }
    longer = Batch(pad, batch.labels, batch.keys, 1, 4.0, 4.0)
    plain, _ = gradients(make(backbone, "mdpd", "unipt", *sets), batch)
    padded, _ = gradients(make(backbone, "mdpd", "unipt", *sets), longer)
    for name in plain:
        torch.testing.assert_close(padded[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_halves_add_up_to_the_whole_batch(backbone):
    sets = ["backbone.dropout_active=false", "loss.logits=0.1"]
    batch = batch_for(backbone)
    whole, losses = gradients(make(backbone, "mdpd", "unipt", *sets), batch)
    method = make(backbone, "mdpd", "unipt", *sets)
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: x[rows] for name, x in batch.inputs.items()}
        total += method.step(Batch(part, batch.labels[rows], batch.keys[rows], 1, 4.0, 4.0))["loss"]
    torch.testing.assert_close(total, losses["loss"])
    for group in method.groups.values():
        for name, parameter in group.items():
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["unipt", "lst", "sherl"])
def test_paper_side_head_reads_the_last_feature(backbone, side):
    method = make(backbone, "mdpd", side, "distill.side_head=paper")
    width = backbone.width if side == "sherl" else method.side.width
    assert method.modules["side_head"].linear.in_features == width
    found, _ = gradients(method, batch_for(backbone))
    assert None not in found.values()
    with pytest.raises(UserError, match=r"--side dtlv1 has none; use distill.side_head=final"):
        make(backbone, "mdpd", "dtlv1", "distill.side_head=paper")


def test_more_late_blocks_than_the_backbone_has_are_refused(backbone):
    with pytest.raises(UserError, match="the backbone has 3 blocks; use late:K with K from 1 to 3"):
        build_norm_gradient("late:4", backbone)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full"}))
def test_bf16_holds_frozen_weights_in_half_and_what_is_trained_in_float32(name, backbone):
    if name == "prefix" and not backbone.takes_prefix:
        with pytest.raises(UserError, match="takes no further keys and values"):
            make(backbone, name, "sherl", "train.precision=bf16")
        return
    method = make(backbone, name, "sherl", "train.precision=bf16")
    wide = {id(p) for p in (method.backbone.norms() | method.backbone_weights).values()}
    for path, parameter in method.backbone.named_parameters():
        expected = torch.float32 if id(parameter) in wide else torch.bfloat16
        assert parameter.dtype == expected, path
    found, losses = gradients(method, batch_for(backbone))
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    exact, plain = gradients(make(backbone, name, "sherl"), batch_for(backbone))
    assert float(losses["loss"]) == pytest.approx(float(plain["loss"]), rel=0.05)
    head = "side_head.linear.weight" if name == "side" else "head.linear.weight"
    a, b = found[head].flatten(), exact[head].flatten()
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.98
