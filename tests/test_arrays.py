"""`.npz` weights of vision transformers, as JAX's authors publish them."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import UserError

NAME = "timm:vit_tiny_patch16_224"


def published(model, heads=3):
    """A timm ViT's weights by the names and in the shapes of google-research/vision_transformer."""
    plain = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "embedding/kernel": plain["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": plain["patch_embed.proj.bias"],
        "cls": plain["cls_token"],
        "Transformer/posembed_input/pos_embedding": plain["pos_embed"],
        "Transformer/encoder_norm/scale": plain["norm.weight"],
        "Transformer/encoder_norm/bias": plain["norm.bias"],
        "head/kernel": np.zeros((192, 21843), np.float32),
        "head/bias": np.zeros(21843, np.float32),
    }
    for index in range(len(model.blocks)):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for place, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{place}/scale"] = plain[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{place}/bias"] = plain[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weight = plain[f"{ours}attn.qkv.weight"].reshape(3, heads, 64, 192)
        bias = plain[f"{ours}attn.qkv.bias"].reshape(3, heads, 64)
        for part, name in enumerate(("query", "key", "value")):
            arrays[f"{attention}{name}/kernel"] = weight[part].transpose(2, 0, 1)
            arrays[f"{attention}{name}/bias"] = bias[part]
        out = plain[f"{ours}attn.proj.weight"].T
        arrays[f"{attention}out/kernel"] = out.reshape(heads, 64, 192)
        arrays[f"{attention}out/bias"] = plain[f"{ours}attn.proj.bias"]
        for place, layer in enumerate(("fc1", "fc2")):
            dense = f"{theirs}MlpBlock_3/Dense_{place}/"
            arrays[f"{dense}kernel"] = plain[f"{ours}mlp.{layer}.weight"].T
            arrays[f"{dense}bias"] = plain[f"{ours}mlp.{layer}.bias"]
    return arrays


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    model = timm.create_model(NAME[5:], img_size=32, num_classes=0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def arrays(source):
    return published(source)


def load(file, **options):
    return load_backbone(BackboneConfig(name=NAME, weights=str(file), img_size=32, **options))


def test_published_names_give_the_very_weights(tmp_path, source, arrays):
    np.savez(tmp_path / "vit.npz", **arrays)
    backbone = load(tmp_path / "vit.npz")
    found, wanted = backbone.model.state_dict(), source.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_other_sizes_are_resampled_as_timm_does(tmp_path, arrays):
    np.savez(tmp_path / "vit.npz", **arrays)
    wanted = timm.create_model(NAME[5:], img_size=64, patch_size=8, num_classes=0)
    wanted.load_pretrained(str(tmp_path / "vit.npz"))
    config = BackboneConfig(name=NAME, weights=str(tmp_path / "vit.npz"), img_size=64, patch_size=8)
    found = load_backbone(config).model.state_dict()
    assert all(torch.equal(found[name], t) for name, t in wanted.state_dict().items())


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def test_files_that_do_not_fit_are_refused(tmp_path, arrays, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        "less": ({k: a for k, a in arrays.items() if "encoderblock_11/" not in k}, "encoderblock_11"),
        "more": (arrays | {"Transformer/encoderblock_12/LayerNorm_0/bias": np.zeros(1)},
                 "it is of 13 blocks"),
        "other": ({"x": np.zeros(2)}, "did not find a supported"),
        "pickled": (arrays | {"cls": np.array([Runs()], dtype=object)}, "allow_pickle=False"),
    }  # fmt: skip
    for name, (content, words) in cases.items():
        np.savez(f"{name}.npz", **content)
        with pytest.raises(UserError, match=f"{name}.npz does not fit .*{words}"):
            load(f"{name}.npz")
    assert not Path("ran-code").exists()
    whole = (tmp_path / "less.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.npz is damaged"):
        load("cut.npz")
    with pytest.raises(UserError, match=r"weights file no\.npz does not exist"):
        load("no.npz")
    np.savez("vit.npz", **arrays)
    own = {"timm_model": NAME[5:], "timm_kwargs": {"init_values": 1e-5, "img_size": 32}}
    Path("scaled").mkdir()
    Path("scaled/config.json").write_text(json.dumps(own))
    for name, words in (("scaled", r"no values for blocks\.0\.ls1"), ("timm:resnet18", "reads no")):
        with pytest.raises(UserError, match=words):
            load_backbone(BackboneConfig(name=name, weights="vit.npz"))


def test_a_run_from_such_weights_deploys_them(tmp_path, arrays, fit_in, image_options):
    np.savez(tmp_path / "vit.npz", **arrays)
    words = {**image_options, "backbone": NAME, "method": "probe", "steps": 1}
    sets = [f"backbone.weights={tmp_path / 'vit.npz'}", "backbone.img_size=32"]
    run = fit_in(tmp_path / "run", words, set=sets)
    run.load_deployed()
    np.savez(tmp_path / "vit.npz", **(arrays | {"cls": arrays["cls"] + 1}))
    with pytest.raises(UserError, match="has changed since the run"):
        run.load_deployed()
