"""`backbone.drop_path`: stochastic depth while training, nothing of it in what is deployed."""

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath
from transformers import SwinConfig, ViTConfig

from mdpd_deploy import export_run
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import BackboneConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.methods import Batch, build_method


def method_of(tiny_vit, method="norms", side="unipt", rate=0.4, **train):
    config = check_config(
        {
            "method": method, "backbone": {"name": str(tiny_vit), "drop_path": rate}, "train": train,
            "side": {"name": side} if method in ("side", "mdpd") else {},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    built = build_method(load_backbone(config.backbone), Classify.numbered(3), config)
    built.train_mode()
    return built


def gradients(method, seed=5):
    torch.manual_seed(3)
    inputs = method.backbone.example_inputs(6)
    torch.manual_seed(seed)
    method.step(Batch(inputs, torch.arange(6) % 3, np.arange(6), 1, 6.0, 6.0))
    groups = method.groups.values()
    return {name: p.grad.clone() for group in groups for name, p in group.items()}


def test_rates_rise_with_the_depth(tiny_vit):
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit), drop_path=0.4))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks()]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    inputs = backbone.example_inputs(2)
    plain = load_backbone(BackboneConfig(name=str(tiny_vit)))
    torch.testing.assert_close(backbone(inputs), plain(inputs), rtol=0, atol=0)  # eval mode
    assert backbone.source.sha256 == plain.source.sha256
    backbone.train()
    assert not torch.equal(backbone(inputs), plain(inputs))


@pytest.mark.parametrize("mode", ["recompute", "recompute-halves"])
@pytest.mark.parametrize("name", ["norms", "mdpd"])
def test_blocks_that_run_again_drop_the_same_paths(tiny_vit, mode, name):
    full = gradients(method_of(tiny_vit, name, norm_grad="full"))
    again = gradients(method_of(tiny_vit, name, norm_grad=mode))
    assert full.keys() == again.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in full.items())
    other = gradients(method_of(tiny_vit, name, norm_grad=mode), seed=6)
    assert any(not torch.equal(again[name], other[name]) for name in full)


def test_blocks_that_dtl_enters_drop_paths_once_each(tiny_vit, monkeypatch):
    """As in its released code: one pass of each block reaches the answer, and it drops paths."""
    dtl = method_of(tiny_vit, "side", "dtlv1")
    first, dropped, plain = dtl.modules["side"].last_tap, [], DropPath.forward
    places = {
        part: index
        for index, block in enumerate(dtl.backbone.blocks())
        for part in (block.drop_path1, block.drop_path2)
    }

    def forward(self, x):
        if self.training and self.drop_prob:
            dropped.append(places[self])
        return plain(self, x)

    monkeypatch.setattr(DropPath, "forward", forward)
    torch.manual_seed(3)
    inputs = dtl.backbone.example_inputs(2)
    dtl.step(Batch(inputs, torch.arange(2), np.arange(2), 1, 2.0, 2.0))
    assert first < dtl.backbone.depth  # what lies behind is entered by the side network alone
    assert dropped.count(1) == dropped.count(2) == 2  # attention and MLP


def test_a_run_is_exported_without_a_trace_of_it(tmp_path, image_options, fit_in, tiny_run):
    sets = ["backbone.drop_path=0.3"]
    assert plan(**image_options, set=sets).options["backbone.drop_path"] == 0.3
    run = fit_in(tmp_path / "run", image_options, steps=2, set=sets)
    bundle = export_run(run.path, out=tmp_path / "bundle")  # every gate passes
    assert bundle.path.is_dir()


def test_transformers_take_it_where_their_config_has_it(tmp_path):
    def folder(kind, **shape):
        from transformers import AutoModel, ViTImageProcessor

        target = tmp_path / kind.model_type
        AutoModel.from_config(kind(image_size=32, **shape)).save_pretrained(target)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(target)
        return str(target)

    swin = folder(
        SwinConfig, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4
    )
    for rate, rates in ((0.4, [0.2, 0.4]), (0.0, [])):
        model = load_backbone(BackboneConfig(name=swin, drop_path=rate))
        found = [
            part.drop_prob for part in model.modules() if type(part).__name__ == "SwinDropPath"
        ]
        assert [rate for rate in found if rate] == pytest.approx(rates)
    vit = folder(
        ViTConfig, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"backbone\.drop_path: .* drops no paths: leave it out"):
        load_backbone(BackboneConfig(name=vit, drop_path=0.1))


@pytest.mark.parametrize("name", ["timm:vgg11", "timm:densenet121"])
def test_a_model_without_is_refused(name):
    with pytest.raises(UserError, match=rf"backbone\.drop_path: {name[5:]}|{name} drops no paths"):
        load_backbone(BackboneConfig(name=name, drop_path=0.1, pretrained=False), fake=True)


def test_it_needs_active_dropout():
    with pytest.raises(UserError, match=r"does nothing with backbone\.dropout_active=false"):
        check_config({"backbone": {"drop_path": 0.1, "dropout_active": False}})
