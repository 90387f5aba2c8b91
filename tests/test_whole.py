"""Models taken whole: any timm or transformers encoder, its blocks and norms found by looking."""

import copy

import numpy as np
import pytest
import torch
from transformers import DebertaV2Config, ElectraConfig, ModernBertConfig, MPNetConfig

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, load_config
from mdpd_deploy.train.methods import Batch, TaskSpec, build_method

# timm name, picture size, blocks, tuned norms: per block and between or behind the blocks
VISION = {
    "swin_tiny_patch4_window7_224": (None, 12 + 3, 12 * 2 + 3 + 1),
    "convnext_atto": (None, 12 + 3 + 1, 12 + 3 + 1),
    "resnet18": (64, 8, 8 * 2 + 3),
    "tf_efficientnet_lite0": (64, 16, 16 * 3 - 1 + 1),
    "eva02_tiny_patch14_224": (None, 12, 12 * 2 + 1),
}
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT = {  # config class, options, tuned norms
    "modernbert": (ModernBertConfig, TINY, 2 * 2 - 1 + 1),
    "deberta-v2": (
        DebertaV2Config,
        TINY | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        2 * 2,
    ),
    "electra": (ElectraConfig, TINY | {"embedding_size": 16}, 2 * 2),
    "mpnet": (MPNetConfig, TINY, 2 * 2),
}


def vision(name):
    size, *_ = VISION[name]
    config = BackboneConfig(name=f"timm:{name}", pretrained=False, img_size=size)
    torch.manual_seed(0)
    return shaken(load_backbone(config))


def shaken(backbone):
    """Give every weight a little noise, so that no gradient is 0 by symmetry."""
    for parameter in backbone.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return backbone


@pytest.fixture(scope="module", params=[*VISION, *TEXT])
def backbone(request, encoder_folder):
    if request.param in VISION:
        return vision(request.param)
    kind, options, _ = TEXT[request.param]
    folder = encoder_folder(kind, **options)
    return shaken(load_backbone(BackboneConfig(name=str(folder)), max_length=12))


def gradients(backbone, mode):
    config = load_config(None, {"method": "norms"}, [f"train.norm_grad={mode}"])
    torch.manual_seed(0)
    method = build_method(copy.deepcopy(backbone), TaskSpec("classify", 3), config)
    method.train_mode()
    batch = Batch(backbone.example_inputs(3, 9), torch.arange(3), np.arange(3), 1, 3.0, 3.0)
    torch.manual_seed(5)
    method.step(batch)
    return {n: p.grad for group in method.groups.values() for n, p in group.items()}, method


def test_the_gradient_of_every_norm_is_that_of_plain_back_propagation(backbone):
    plain, _ = gradients(backbone, "full")
    exact, method = gradients(backbone, "recompute")
    assert plain.keys() == exact.keys() and len(exact) > 8
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(exact[name], gradient), name
    others = {n for n, p in method.backbone.named_parameters() if p.grad is not None}
    assert {f"backbone.{n}" for n in others} == exact.keys() - {
        "head.linear.weight",
        "head.linear.bias",
    }
    late, _ = gradients(backbone, "late:1")
    assert 2 < len(late) < len(exact)
    assert all(torch.equal(exact[name], gradient) for name, gradient in late.items())
