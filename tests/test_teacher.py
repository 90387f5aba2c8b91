"""`distill.teacher=untouched`: the side network learns as it would alone, whatever its student does."""

import numpy as np
import pytest
import torch

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.methods import Batch, build_method

SIDES = ("unipt", "sherl", "dtlv1")
UNTOUCHED = "distill.teacher=untouched"


def make(folder, method="mdpd", side="unipt", *sets):
    backbone = load_backbone(BackboneConfig(name=str(folder)), max_length=24)
    options = [f"side.name={side}", *([] if side == "dtlv1" else ["side.reduction=2"]), *sets]
    config = load_config(None, {"method": method}, ["backbone.dropout_active=false", *options])
    torch.manual_seed(0)
    built = build_method(backbone, Classify.numbered(3), config)
    built.eval_mode()
    return built


def batch_for(method):
    torch.manual_seed(3)
    inputs = method.backbone.example_inputs(4, 9)
    return Batch(inputs, torch.arange(4) % 3, np.arange(4), 0, 4.0, 4.0)


def push_norms(method):
    """Move the tuned norms far from where they were."""
    for number, weight in enumerate(method.backbone_weights.values()):
        weight.data += 0.3 * torch.randn(
            weight.shape, generator=torch.Generator().manual_seed(number)
        )


def gradients_of(method, group):
    method.step(batch_for(method))
    return {name: p.grad for name, p in method.groups[group].items()}


@pytest.mark.parametrize("side", SIDES)
def test_the_teacher_learns_what_the_side_network_alone_would(side, tiny_vit, tiny_bert):
    for folder in (tiny_vit, tiny_bert):
        losses = [] if side == "dtlv1" else ["loss.shallow=0", "loss.deep=0"]
        taught = make(folder, "mdpd", side, UNTOUCHED, "loss.logits=1", *losses)
        alone = make(folder, "side", side)
        for name, module in alone.modules.items():
            module.load_state_dict(taught.modules[name].state_dict())
        push_norms(taught)
        found, expected = gradients_of(taught, "side"), gradients_of(alone, "side")
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_no_student_moves_its_answer_and_the_student_follows_it(tiny_vit):
    taught = make(tiny_vit, "mdpd", "unipt", UNTOUCHED, "loss.logits=1")
    inputs = batch_for(taught).inputs
    with torch.no_grad():
        before = taught.outputs(inputs)
        push_norms(taught)
        after = taught.outputs(inputs)
    assert torch.equal(before["side"], after["side"])
    assert not torch.allclose(before["deployed"], after["deployed"])
    norms = {name: weight.clone() for name, weight in taught.backbone_weights.items()}
    pulls = gradients_of(taught, "norms")
    assert all(gradient.abs().sum() > 0 for gradient in pulls.values())
    for name, weight in norms.items():  # what the teacher read by is put away again
        assert torch.equal(taught.backbone_weights[name], weight)


def test_recomputed_gradients_and_the_forecast_hold(tiny_vit):
    exact, plain = (
        make(tiny_vit, "mdpd", "sherl", UNTOUCHED, f"train.norm_grad={mode}", "loss.logits=1")
        for mode in ("recompute", "full")
    )
    for method in (exact, plain):
        push_norms(method)
    found, expected = gradients_of(exact, "norms"), gradients_of(plain, "norms")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_deploys_the_student_and_keeps_the_teacher_as_it_learnt(
    tmp_path, image_options, fit_in
):
    run = fit_in(tmp_path / "run", image_options, lr=0.05, set=[UNTOUCHED, "loss.logits=1"])
    kept, trained = run.load_with_side()
    bare = run.load_backbone().state_dict()
    assert trained
    assert all(torch.equal(value, bare[name]) for name, value in kept.backbone.state_dict().items())
    deployed = run.load_deployed().backbone.state_dict()
    assert any(not torch.equal(value, bare[name]) for name, value in deployed.items())
    memory = run.summary["memory"]
    assert memory["peak_live_bytes"] == pytest.approx(memory["forecast_bytes"], rel=0.02)


def test_late_norms_have_nothing_to_reach(tiny_vit):
    with pytest.raises(UserError, match=r"late_norm_grad=True does nothing with distill\.teacher"):
        make(tiny_vit, "mdpd", "sherl", UNTOUCHED, "train.late_norm_grad=true")
