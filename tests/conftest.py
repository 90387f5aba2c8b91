"""Fixtures of more than one room: small real data, tiny encoders, and short real runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

WORDS = [
    "the",
    "a",
    "film",
    "was",
    "is",
    "good",
    "bad",
    "great",
    "awful",
    "boring",
    "fine",
    "dull",
    "bright",
    "warm",
    "cold",
    "slow",
    "not",
    "very",
]
GOOD = {"good", "great", "fine", "bright", "warm"}


def write_digit_folder(root: Path, per_class: int = 12, classes: int = 3) -> Path:
    """Write `train/CLASS/*.png` and `validation/CLASS/*.png` from scikit-learn's digits."""
    from PIL import Image

    digits = load_digits()
    for label in range(classes):
        pictures = digits.images[digits.target == label]
        for index in range(per_class + 6):
            split = "train" if index < per_class else "validation"
            folder = root / split / f"digit{label}"
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((pictures[index] * 15.9).astype("uint8"))
            picture.resize((32, 32)).save(folder / f"{index:03d}.png")
    return root


def write_sentences(path: Path, count: int, seed: int, *, regression: bool = False) -> Path:
    """Write a CSV of short sentences whose label is a function of their words."""
    import numpy as np

    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sentence", "label"])
        for _ in range(count):
            words = rng.choice(WORDS, size=rng.integers(3, 9))
            share = sum(word in GOOD for word in words) / len(words)
            label = 3 * share if regression else ("neg", "pos")[int(share > 0.27)]
            writer.writerow([" ".join(words), label])
    return path


def write_tiny_bert(folder: Path, **options: int) -> Path:
    """Save a random three-block BERT and its word-level tokenizer, weights included."""
    from transformers import BertConfig

    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    return write_encoder(folder, BertConfig, max_position_embeddings=48, **(shape | options))


def write_encoder(folder: Path, kind, **options) -> Path:
    """Save a random encoder of a transformers config class with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModel, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    config = kind(vocab_size=len(vocabulary), pad_token_id=0, **options)
    pooler = {"add_pooling_layer": False} if config.model_type == "bert" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config, **pooler).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    segments = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", *segments, "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tiny_vit(folder: Path, **options: int) -> Path:
    """Save a random three-block ViT of 16 × 16 images in our local-folder layout."""
    kwargs = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4)
    return write_timm(folder, "vit_tiny_patch16_224", 16, **(kwargs | options))


def write_timm(folder: Path, name: str, size: int, **kwargs: object) -> Path:
    """Save a random timm model for pictures of size × size in our local-folder layout."""
    import timm
    import torch
    from safetensors.torch import save_file

    kwargs["num_classes"] = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    plain = {
        "timm_model": name, "timm_kwargs": kwargs, "input_size": [3, size, size],
        "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


SWIN = dict(img_size=64, embed_dim=16, depths=[1, 2, 4, 2], num_heads=[1, 2, 4, 8], window_size=4)
STAGED = {  # hierarchical networks of a few thousand to a few hundred thousand weights
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnextv2_atto", dict(depths=[1, 2, 4, 2], dims=[8, 16, 24, 32])),
    "resnet": ("test_resnet", dict(layers=[1, 2, 3, 2])),
    "efficientnet": ("test_efficientnet", {}),
}


def start_python(
    *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python with the words and variables given; what it printed comes back."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def run_python():
    return start_python


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
    return write_tiny_vit(tmp_path_factory.mktemp("tiny-vit"))


@pytest.fixture(scope="session")
def staged_folder(tmp_path_factory):
    """Gives the folder of a model of STAGED by its name, for pictures of 64 × 64."""

    def write(name: str) -> Path:
        model, kwargs = STAGED[name]
        return write_timm(tmp_path_factory.mktemp(name), model, 64, **kwargs)

    return cache(write)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """Writes a random encoder: `encoder_folder(ModernBertConfig, hidden_size=32, …)`."""
    return lambda kind, **options: write_encoder(
        tmp_path_factory.mktemp(kind.model_type), kind, **options
    )


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory) -> Path:
    return write_digit_folder(tmp_path_factory.mktemp("digit-folder"))


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory) -> Path:
    """A folder with train.csv and validation.csv, columns sentence and label (neg, pos)."""
    folder = tmp_path_factory.mktemp("sentences")
    write_sentences(folder / "train.csv", 60, 0)
    write_sentences(folder / "validation.csv", 30, 1)
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """Folders `labels` and `scores` with enough sentences to learn the words of WORDS from."""
    folder = tmp_path_factory.mktemp("many")
    for name, regression in (("labels", False), ("scores", True)):
        (folder / name).mkdir()
        for seed, (split, count) in enumerate((("train", 400), ("validation", 60))):
            write_sentences(folder / name / f"{split}.csv", count, seed, regression=regression)
    return folder


@pytest.fixture(scope="session")
def image_options(tiny_vit, digit_folder) -> dict:
    """The words of `fit` for a short image run."""
    return dict(task="classify", data=digit_folder, backbone=tiny_vit, steps=6, batch=8)


@pytest.fixture(scope="session")
def text_options(tiny_bert, sentence_folder) -> dict:
    """The words of `fit` for a short text run."""
    return dict(
        task="classify", data=sentence_folder, text="sentence", backbone=tiny_bert, steps=6,
        batch=8, set=["side.reduction=2", "data.max_length=24"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def fit_in():
    """`fit` into a folder with the words of one dict and others on top, those of `set` added."""
    from mdpd_deploy import fit

    def run(folder, options, **more):
        both = {**options, **more}
        both["set"] = [*options.get("set", ()), *more.get("set", ())]
        return fit(out=folder, quiet=True, **both)

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, image_options):
    """A completed MDPD run on images (over UniPT); treat it as read-only."""
    from mdpd_deploy import fit

    return fit(out=tmp_path_factory.mktemp("runs") / "image", quiet=True, **image_options)


@pytest.fixture(scope="session")
def tiny_text_run(tmp_path_factory, text_options):
    """A completed MDPD run on text (over SHERL); treat it as read-only."""
    from mdpd_deploy import fit

    out = tmp_path_factory.mktemp("runs") / "text"
    return fit(out=out, side="sherl", quiet=True, **text_options)


@pytest.fixture(scope="session")
def tiny_side_run(tmp_path_factory, image_options):
    """A completed `--method side` run on images; treat it as read-only."""
    from mdpd_deploy import fit

    out = tmp_path_factory.mktemp("runs") / "side"
    return fit(out=out, method="side", quiet=True, **image_options)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_run):
    """The bundle of `tiny_run`, every gate passed; treat it as read-only."""
    from mdpd_deploy import export_run

    return export_run(tiny_run.path, out=tmp_path_factory.mktemp("bundles") / "digits")


@pytest.fixture(scope="session")
def tiny_text_bundle(tmp_path_factory, tiny_text_run):
    """The bundle of `tiny_text_run`, every gate passed; treat it as read-only."""
    from mdpd_deploy import export_run

    return export_run(tiny_text_run.path, out=tmp_path_factory.mktemp("bundles") / "films")


@pytest.fixture(scope="session")
def tiny_trt_bundle(tmp_path_factory, tiny_text_run) -> Path:
    """A bundle of `--fmt trt` made where TensorRT is not; treat it as read-only."""
    from mdpd_deploy import export_run

    out = tmp_path_factory.mktemp("bundles") / "text"
    options = dict(golden="synthetic", metric_gate=False)
    return export_run(tiny_text_run.path, fmt="trt", out=out, **options).path


@pytest.fixture
def unwarmed(monkeypatch):
    """Benchmarks measure at once; tests/test_latency.py asks how long they warm up."""
    from mdpd_deploy.serve.latency import cells

    plan = partial(cells.Plan, warmup_seconds=0.0, warmup_cap=0.0)
    monkeypatch.setattr(cells, "Plan", plan)


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """`private.pem`, `public.pem`, another pair, and one with a password."""
    pytest.importorskip("model_signing", reason="signs bundles")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for stem, curve, password in (
        ("", ec.SECP256R1(), None),
        ("other-", ec.SECP384R1(), None),
        ("locked-", ec.SECP256R1(), b"open sesame"),
    ):
        key = ec.generate_private_key(curve)
        lock = form.BestAvailableEncryption(password) if password else form.NoEncryption()
        (folder / f"{stem}private.pem").write_bytes(
            key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock)
        )
        (folder / f"{stem}public.pem").write_bytes(
            key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        )
    return folder


@pytest.fixture(scope="session")
def real_peak():
    """Measure the memory of the second step of real training on CPU."""
    from mdpd_deploy.backbones import load_backbone
    from mdpd_deploy.tasks import Classify
    from mdpd_deploy.train.memory.forecast import (
        _step,
        example_batches,
        measured_step,
    )
    from mdpd_deploy.train.methods import build_method
    from mdpd_deploy.train.optim import build_optimizer

    def measure(config, task=Classify.numbered(3)):  # noqa: B008
        backbone = load_backbone(config.backbone, max_length=config.data.max_length)
        method = build_method(backbone, task.example(config), config)
        method.train_mode()
        optimizer = build_optimizer(method)
        parts = example_batches(backbone, method, config, config.data.max_length)
        _step(method, optimizer, parts)
        with measured_step(method, optimizer, parts) as peak:
            _step(method, optimizer, parts)
        return peak

    return measure


FAKES = Path(__file__).parent / "fakes"


@pytest.fixture
def stand_in(monkeypatch):
    """Call it with a release to put the stand-ins for TensorRT and CUDA in their places.

    It returns both modules; their `_faults` make single steps fail.
    """
    names = ("cuda", "cuda.bindings", "cuda.bindings.runtime", "tensorrt")
    before = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(FAKES)

    def load(version: str = "11.4.0.106"):
        for name in names:
            sys.modules.pop(name, None)
        monkeypatch.setenv("MDPD_FAKE_TRT", version)
        return import_module("tensorrt"), import_module("cuda.bindings.runtime")

    yield load
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


def pytest_configure(config):
    """Give signals their usual meaning: a test run in the background may ignore some of them."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items):
    """Files with a slow test come first, so that no process works alone at the end.

    Tests marked `network` run only where MDPD_TEST_NETWORK=1 asks for them.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if os.environ.get("MDPD_TEST_NETWORK") != "1":
        reason = "fetches packages: set MDPD_TEST_NETWORK=1"
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason=reason))
