"""transformers' vision encoders and the towers of image-text models, taken whole."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.hf_pictures import read_preprocess
from mdpd_deploy.config import BackboneConfig, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.methods import Batch, build_method

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
PLAIN = TINY | dict(image_size=32, patch_size=8)
STAGES = dict(image_size=64, num_channels=3, hidden_sizes=[16, 32], depths=[1, 1])
TOWERS = dict(
    vision_config=PLAIN,
    text_config=TINY | dict(vocab_size=16, max_position_embeddings=12, eos_token_id=3),
)
MODELS = {  # model type: options of its config, features, tuned norms
    "vit": (PLAIN, "patches", 2 * 2 + 1),
    "deit": (PLAIN, "patches", 2 * 2 + 1),
    "dinov2": (PLAIN | {"use_swiglu_ffn": True}, "pooler", 2 * 2 + 1),
    "dinov3_vit": (PLAIN | {"num_register_tokens": 2, "use_gated_mlp": True}, "pooler", 2 * 2 + 1),
    "beit": (PLAIN, "pooler", 2 * 2 + 1),  # its last norm is the pooler's
    "swin": (dict(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4), "mean", 6),
    "convnext": (STAGES | {"num_stages": 2}, "pooler", 1 + 1 + 1 + 1),
    "resnet": (STAGES | {"embedding_size": 16, "layer_type": "basic"}, "pooler", 5),
    "siglip_vision_model": (PLAIN, "pooler", 2 * 2 + 2),
    "clip_vision_model": (PLAIN, "pooler", 2 * 2 + 1),
    "clip": (TOWERS, "pooler", 2 * 2 + 1),
    "siglip": (TOWERS, "pooler", 2 * 2 + 2),
    "metaclip_2": (TOWERS, "pooler", 2 * 2 + 1),  # towers that no automatic class makes
}  # fmt: skip
SQUASHED = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


def write(folder, kind, options, processor=SQUASHED):
    """Save a random model with how its pictures are prepared; return the model."""
    torch.manual_seed(0)
    plain = {**options}
    if "vision_config" in plain:
        plain = {name: dict(part) for name, part in plain.items()}
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**plain)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def load(folder, max_length=12, **options):
    return load_backbone(BackboneConfig(name=str(folder), **options), max_length=max_length)


@pytest.fixture(scope="module", params=MODELS)
def picture(request, tmp_path_factory):
    """(name, folder, the library's model, our backbone); leave them as they are."""
    folder = tmp_path_factory.mktemp("picture") / request.param
    size = MODELS[request.param][0].get("image_size", 32)
    processor = SQUASHED | {"size": {"height": size, "width": size}}
    model = write(folder, request.param, MODELS[request.param][0], processor)
    return request.param, folder, getattr(model, "vision_model", model), load(folder)


def test_features_are_the_librarys(picture):
    name, _, model, backbone = picture
    inputs = backbone.example_inputs(3)
    with torch.no_grad():
        expected, found = model(**inputs), backbone(inputs)
    tokens = expected.last_hidden_state
    wanted = {
        "pooler": lambda: expected.pooler_output.flatten(1),
        "patches": lambda: tokens[:, -16:].mean(1),  # 4 × 4 patches behind class tokens
        "mean": lambda: tokens.mean(1),
    }[MODELS[name][1]]()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert backbone.takes == "image" and backbone.width == found.shape[1]
    assert not backbone.has_taps or name in ("vit", "deit")


def test_norms_are_found_and_their_gradients_exact(picture):
    name, _, _, backbone = picture
    assert len({n.rpartition(".")[0] for n in backbone.norms()}) == MODELS[name][2]
    found = []
    for mode in ("full", "recompute"):
        config = load_config(None, {"method": "norms"}, [f"train.norm_grad={mode}"])
        torch.manual_seed(0)
        method = build_method(load(picture[1]), Classify.numbered(3), config)
        method.train_mode()
        torch.manual_seed(0)
        method.step(Batch(backbone.example_inputs(3), torch.arange(3), np.arange(3), 1, 3.0, 3.0))
        found.append({n: p.grad for n, p in method.backbone_weights.items()})
    for path, gradient in found[0].items():
        assert gradient.abs().sum() > 0, path
        assert torch.equal(found[1][path], gradient), path


PROCESSORS = {
    "vit": SQUASHED,
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32},
    "dinov2": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 38},
        "crop_size": {"height": 32, "width": 32}, "resample": 3,
    },
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": 36, "crop_size": 32},
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32},
        "crop_pct": 0.875,
    },
    "levit": {
        "image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    },
    "scaled": SQUASHED | {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.8, 0.6]},
    "bare": SQUASHED | {"do_normalize": False},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(60, 40), (41, 75)])
def test_pictures_are_prepared_as_by_the_library(name, shape, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image = small.resize(shape, Image.Resampling.BICUBIC)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = theirs(image, return_tensors="np")["pixel_values"]
    found = read_preprocess(str(tmp_path), {}, "it")([image])["pixel_values"]
    assert found.shape == expected.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(found, expected, atol=0.03)  # a step of 255, where rounding differs
    assert np.abs(found - expected).mean() < 2e-3


def test_a_run_returns_from_its_own_weights(tmp_path):
    write(tmp_path / "model", "clip", TOWERS)
    first = load(tmp_path / "model", pretrained=False)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    config = BackboneConfig(name=str(tmp_path / "model"), pretrained=False)
    again = load_backbone(config, weights_file=tmp_path / "state.safetensors")
    inputs = first.example_inputs(2)
    assert torch.equal(again(inputs), first(inputs))
    fake = load_backbone(config, fake=True)
    assert {n: p.shape for n, p in fake.named_parameters()} == {
        n: p.shape for n, p in first.named_parameters()
    }


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_text_tower_pools_as_it_was_trained_to(kind, tmp_path):
    model = write(tmp_path, kind, TOWERS)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    ).save_pretrained(tmp_path)
    backbone = load(tmp_path, tower="text")
    arrays = backbone.preprocess(["a b [SEP]", "c [SEP]"])
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert (inputs["input_ids"].shape[1], "attention_mask" in inputs) == (
        (3, True) if kind == "clip" else (12, False)  # SigLIP knows padded texts and no mask
    )
    with torch.no_grad():
        expected = model.text_model(**inputs).pooler_output
        torch.testing.assert_close(backbone(inputs), expected)
    assert backbone.takes == "text" and len(backbone.norms()) == 2 * (2 * 2 + 1)


# --- what cannot be taken -------------------------------------------------------------------------


def refused(match, folder, **options):
    with pytest.raises(UserError, match=match) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_taken_is_refused_in_a_sentence(tmp_path):
    vit = tmp_path / "vit"
    write(vit, "vit", PLAIN)

    def changed(name, file="config.json", **changes):
        folder = tmp_path / name
        shutil.copytree(vit, folder)
        plain = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(plain | changes))
        return folder

    refused(
        "brings code of its own.*never run here.*'evil'",
        changed("remote", model_type="evil", auto_map={"AutoModel": "evil.Evil"}),
    )
    refused("is of the model type 'unheard'", changed("unknown", model_type="unheard"))
    refused("'gpt2', neither a text encoder", changed("decoder", model_type="gpt2"))
    refused("tower=text: .* is one encoder", vit, tower="text")
    refused("img_size does not apply", vit, img_size=64)
    write(tmp_path / "beit", "beit", PLAIN)
    write(tmp_path / "video", "timesformer", PLAIN | {"num_frames": 2})
    refused("reads videos of 2 frames", tmp_path / "video")
    refused("has no class token", tmp_path / "beit", pooling="cls")
    folder = changed("renamed")
    state = load_file(folder / "model.safetensors")
    renamed = {f"trunk.{name}": tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    refused("lacks .* tensors of the encoder, .* of another model", folder)
    file = "preprocessor_config.json"
    refused(
        "swaps red and blue", changed("bgr", file, image_processor_type="MobileViTImageProcessor")
    )
    refused("any size", changed("free", file, do_resize=False))
    refused("cannot be run: .*size", changed("size", file, size={"height": 64, "width": 64}))
    (vit / file).unlink()
    refused("no preprocessing can be read", vit)


def test_a_generator_behind_a_vision_tower_has_no_text_tower(tmp_path):
    options = dict(
        vision_config=PLAIN | {"model_type": "clip_vision_model"},
        text_config=TINY | {"model_type": "llama", "vocab_size": 64},
    )
    folder = tmp_path / "llava"
    torch.manual_seed(0)
    AutoModel.from_config(CONFIG_MAPPING["llava"](**options)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SQUASHED))
    assert load(folder).width == 32
    refused("'llama', neither a text encoder", folder, tower="text")
