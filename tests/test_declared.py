"""Declared encoders: their taps are the library's states, and all that needs taps works on them.

A new family is one entry of `declared.py` and one row of a table here.
"""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from mdpd_deploy.adapters import inject, merged_weights
from mdpd_deploy.backbones import declared, load_backbone
from mdpd_deploy.backbones.declared import TEXT
from mdpd_deploy.config import BackboneConfig, PeftConfig, SideConfig, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides import build_side
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.methods import Batch, build_method

TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
TEXTS = {  # model type: options of its config, tuned norms of a model with three blocks
    "bert": ({}, 6),
    "roberta": ({}, 6),
    "xlm-roberta": ({}, 6),
    "electra": ({"embedding_size": 16}, 6),
    "camembert": ({}, 6),
    "mpnet": ({}, 6),
    "data2vec-text": ({}, 6),
    "ernie": ({}, 6),
    "rembert": ({"input_embedding_size": 16}, 6),
    "roformer": ({"embedding_size": 16}, 6),
    "roberta-prelayernorm": ({}, 7),
    "xlm-roberta-xl": ({}, 7),
    "megatron-bert": ({}, 7),
    "distilbert": (dict(dim=32, n_layers=3, n_heads=4, hidden_dim=48), 6),
    "deberta": (RELATIVE, 6),
    "deberta-v2": ({**RELATIVE, "norm_rel_ebd": "layer_norm", "share_att_key": True}, 6),
    "gte": ({}, 6),
    "nomic_bert": ({}, 6),
    "jina_embeddings_v3": ({}, 6),
    "eurobert": ({"num_key_value_heads": 4, "head_dim": 8}, 7),
    "modernbert": ({}, 6),  # the first block has one norm, and one stands behind the last
}
PICTURES = {  # model type: options of its config, prefix tokens
    "vit": ({}, 1),
    "deit": ({}, 2),
    "ijepa": ({}, 0),
    "vit_msn": ({}, 1),
    "dinov2": ({}, 1),
    "dinov2_with_registers": ({"num_register_tokens": 3}, 4),
    "dinov3_vit": ({"num_register_tokens": 3}, 4),
}
PATCHES = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
TIMM = {  # timm's name: prefix tokens, tuned norms, whether layers can be wrapped
    "vit_small_patch16_dinov3": (5, 7, True),
    "eva02_tiny_patch14_224": (1, 7, False),
    "eva02_base_patch14_224": (1, 7, True),
    "vit_pe_core_tiny_patch16_384": (1, 8, True),
    "beit_base_patch16_224": (1, 7, False),
    "vit_relpos_base_patch16_rpn_224": (0, 7, True),
    "vit_base_patch16_siglip_224": (0, 8, True),
    "vit_small_patch14_reg4_dinov2": (5, 7, True),
    "deit3_small_patch16_224": (1, 7, True),
}


def shaken(backbone):
    """Give every weight a little noise, so that nothing is zero by symmetry."""
    for name, parameter in backbone.named_parameters():
        parameter.data += (0.2 if "embed" in name else 0.05) * torch.randn(parameter.shape)
    return backbone


@pytest.fixture(scope="module", params=TIMM)
def vision(request, tmp_path_factory):
    """(name, a declared vision transformer with random weights); leave it as it is."""
    folder = tmp_path_factory.mktemp("vision")
    plain = {"timm_model": request.param, "timm_kwargs": PATCHES, "input_size": [3, 32, 32]}
    (folder / "config.json").write_text(json.dumps(plain))
    torch.manual_seed(0)
    config = BackboneConfig(name=str(folder), pretrained=False)
    return request.param, shaken(load_backbone(config))


@pytest.fixture(scope="module", params=TEXTS)
def text(request, encoder_folder):
    """A declared text encoder with random weights; leave it as it is."""
    torch.manual_seed(0)
    options = TEXTS[request.param][0]
    sizes = {} if "dim" in options else TINY
    folder = encoder_folder(CONFIG_MAPPING[request.param], **sizes | options)
    return shaken(load_backbone(BackboneConfig(name=str(folder)), max_length=12))


def test_every_declaration_is_tried():
    assert TEXT.keys() == TEXTS.keys()
    assert declared.PICTURES.keys() == PICTURES.keys()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_taps_are_the_states_of_the_library(text, attention):
    inputs = text.example_inputs(4, 11)
    mask = inputs["attention_mask"].bool()
    library = AutoModel.from_config(text.model.config).eval()
    library.load_state_dict(text.model.state_dict(), strict=False)
    with torch.no_grad():
        expected = library(**inputs, output_hidden_states=True)
        backbone = copy.deepcopy(text)
        backbone.set_attention(attention)
        trace = backbone.trace(inputs)
        pooled = backbone(inputs)
    assert (
        len(trace.taps) == 4 and len(backbone.norms()) % TEXTS[text.model.config.model_type][1] == 0
    )
    for tap, state in zip(trace.taps[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(tap[mask], state[mask], atol=1e-5, rtol=1e-5)
    last = backbone.normalise(trace.taps[-1])
    torch.testing.assert_close(last[mask], expected.last_hidden_state[mask], atol=1e-5, rtol=1e-5)
    weight = mask[..., None].float()
    mean = (expected.last_hidden_state * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(pooled, mean, atol=1e-5, rtol=1e-5)


def test_the_declared_norms_are_tuned(text):
    norms = {path.rpartition(".")[0] for path in text.norms()}
    assert len(norms) == TEXTS[text.model.config.model_type][1]
    assert not any("embed" in path or "rel_" in path for path in norms)
    assert all(parameter.shape == (text.width,) for parameter in text.norms().values())


@pytest.mark.parametrize("side", ["sherl", "lst"])
def test_gradients_are_exact_beside_every_side_network(text, side):
    if side == "lst" and not text.declared.thin:
        with pytest.raises(UserError, match=r"side.name=lst: a thinner copy of \w+ could not read"):
            build_side(text, SideConfig(name="lst", reduction=2))
        return
    plain, exact = (step(text, f"train.norm_grad={mode}", side) for mode in ("full", "recompute"))
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(exact[name], gradient), name


def step(backbone, mode, side):
    """Return the gradients of one step of MDPD."""
    options = {} if side == "dtl" else {"side.reduction": 2}
    config = load_config(None, {"method": "mdpd", "side.name": side, **options}, [mode])
    torch.manual_seed(0)
    method = build_method(copy.deepcopy(backbone), Classify.numbered(3), config)
    method.train_mode()
    batch = Batch(backbone.example_inputs(3, 9), torch.arange(3), np.arange(3), 1, 3.0, 3.0)
    torch.manual_seed(5)
    method.step(batch)
    return {name: p.grad for name, p in method.backbone_weights.items()}


def test_whole_copies_of_blocks_compute_what_the_blocks_do(text):
    """r = 1 keeps every unit, so the ladder's blocks are the backbone's."""
    if not text.declared.thin:
        pytest.skip("no thinner copies of these blocks can be made")
    side = build_side(text, SideConfig(name="lst", reduction=1)).eval()
    trace = text.trace(text.example_inputs(2, 9))
    for index, block in enumerate(side.blocks):
        x, expected = trace.taps[index : index + 2]
        torch.testing.assert_close(text.run_block(trace, index, x, block=block), expected)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_merged_adapters_give_the_outputs_of_the_layers(text, name):
    adapted, plain = copy.deepcopy(text), copy.deepcopy(text)
    config = PeftConfig(rank=3, targets="all")
    inject(adapted, name, config, random=True)
    inputs = plain.example_inputs(3)
    with torch.no_grad():
        before, layered = plain(inputs), adapted(inputs)
        for weight, value in merged_weights(adapted).items():
            plain.get_parameter(weight).copy_(value)
        after = plain(inputs)
    assert (layered - before).abs().max() > 1e-3
    torch.testing.assert_close(after, layered, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_are_attended_to_or_refused(text, name):
    config = load_config(None, {"method": name}, ["peft.tokens=4"])
    takes = text.takes_prompt if name == "prompt" else text.takes_prefix
    if not takes:
        with pytest.raises(UserError, match=f"--method {name}: the .* use --method"):
            build_method(copy.deepcopy(text), Classify.numbered(3), config)
        return
    method = build_method(copy.deepcopy(text), Classify.numbered(3), config)
    method.train_mode()
    batch = Batch(text.example_inputs(3, 9), torch.arange(3), np.arange(3), 1, 3.0, 3.0)
    assert torch.isfinite(method.step(batch)["loss"])
    assert all(p.grad.abs().sum() > 0 for p in method.modules["tokens"].parameters())


# --- vision transformers of timm ------------------------------------------------------------------


def test_taps_and_features_are_those_of_timm(vision):
    name, backbone = vision
    prefix, norms, _ = TIMM[name]
    assert (backbone.prefix_tokens, backbone.grid) == (prefix, (4, 4))
    inputs = backbone.example_inputs(2)
    model = backbone.model
    with torch.no_grad():
        trace = backbone.trace(inputs)
        tokens, states = model.forward_intermediates(inputs["pixel_values"], output_fmt="NLC")
        features = backbone(inputs)
        expected = model(inputs["pixel_values"])
        if not backbone.pools_by_attention:
            pooled = tokens[:, prefix:].mean(1)
            expected = model.fc_norm(pooled) if backbone.norm_after_pool else pooled
    for tap, state in zip(trace.taps[1:], states, strict=True):
        torch.testing.assert_close(tap[:, prefix:], state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert len({path.rpartition(".")[0] for path in backbone.norms()}) == norms


def test_the_pooling_keeps_gradients_from_norms_where_it_is_told_to(vision):
    backbone = copy.deepcopy(vision[1])
    x = backbone.trace(backbone.example_inputs(2)).taps[-1]
    norms = backbone.final_norm_parameters()
    for parameter in norms.values():
        parameter.requires_grad_(True)
    held = backbone.finish(x.requires_grad_(), None, blocked=True)
    held.square().sum().backward()
    assert x.grad is not None and all(p.grad is None for p in norms.values())
    free = backbone.finish(x, None)
    assert torch.equal(free, held)
    free.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in norms.values())


@pytest.mark.parametrize("side", ["sherl", "dtl"])
def test_gradients_are_exact_beside_side_networks_of_pictures(vision, side):
    backbone = vision[1]
    plain, exact = (step(backbone, f"train.norm_grad={m}", side) for m in ("full", "recompute"))
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(exact[name], gradient), name


@pytest.mark.parametrize("name", ["lst", "prompt"])
def test_blocks_with_positions_of_their_own_refuse_what_changes_them(vision, name):
    backbone = copy.deepcopy(vision[1])
    options = (
        {"method": "prompt"}
        if name == "prompt"
        else {"method": "side", "side.name": "lst", "side.reduction": 2}
    )
    config = load_config(None, options, [])
    if backbone.takes_prompt:
        assert build_method(backbone, Classify.numbered(3), config)
        return
    with pytest.raises(UserError, match=r"positions of its own|no thinner copy"):
        build_method(backbone, Classify.numbered(3), config)


def test_layers_that_the_blocks_call_take_adapters(vision):
    name, backbone = vision
    adapted, plain = copy.deepcopy(backbone), copy.deepcopy(backbone)
    if not TIMM[name][2]:
        with pytest.raises(UserError, match=r"read the weight of attn\.qkv without calling"):
            inject(adapted, "lora", PeftConfig())
        return
    inject(adapted, "lora", PeftConfig(rank=3, targets="all"), random=True)
    inputs = plain.example_inputs(2)
    with torch.no_grad():
        before, layered = plain(inputs), adapted(inputs)
        for weight, value in merged_weights(adapted).items():
            plain.get_parameter(weight).copy_(value)
        torch.testing.assert_close(plain(inputs), layered, rtol=1e-4, atol=1e-4)
    assert (layered - before).abs().max() > 1e-3


# --- vision transformers of transformers ----------------------------------------------------------


@pytest.fixture(scope="module", params=PICTURES)
def picture(request, tmp_path_factory):
    """A declared vision encoder of transformers with random weights; leave it as it is."""
    folder = tmp_path_factory.mktemp("picture")
    torch.manual_seed(0)
    options = TINY | dict(image_size=32, patch_size=8) | PICTURES[request.param][0]
    AutoModel.from_config(CONFIG_MAPPING[request.param](**options)).save_pretrained(folder)
    prepared = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    config = BackboneConfig(name=str(folder), pretrained=False)
    return shaken(load_backbone(config))


def test_taps_of_pictures_are_the_states_of_the_library(picture):
    prefix = PICTURES[picture.model.config.model_type][1]
    assert (picture.prefix_tokens, picture.grid, picture.takes) == (prefix, (4, 4), "image")
    inputs = picture.example_inputs(2)
    with torch.no_grad():
        expected = picture.model(**inputs, output_hidden_states=True)
        trace = picture.trace(inputs)
        features = picture(inputs)
    for tap, state in zip(trace.taps[1:-1], expected.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(tap, state, atol=1e-5, rtol=1e-5)
    mean = expected.last_hidden_state[:, prefix:].mean(1)
    torch.testing.assert_close(features, mean, atol=1e-5, rtol=1e-5)
    assert len({path.rpartition(".")[0] for path in picture.norms()}) == 2 * 3 + 1


@pytest.mark.parametrize("side", ["unipt", "lst"])
def test_gradients_are_exact_beside_side_networks_of_the_librarys_pictures(picture, side):
    if side == "lst" and not picture.declared.thin:
        with pytest.raises(UserError, match=r"side.name=lst: a thinner copy of \w+ could not read"):
            build_side(picture, SideConfig(name="lst", reduction=2))
        return
    plain, exact = (step(picture, f"train.norm_grad={m}", side) for m in ("full", "recompute"))
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(exact[name], gradient), name
