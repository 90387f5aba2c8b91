"""What a tokenizer's files say is obeyed or refused: ids against the transformers library's own."""

import json
from pathlib import Path

import numpy as np
import pytest

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.data.preprocess import load_preprocess
from mdpd_deploy.errors import UserError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = (
    "the The film Film was is good bad not very un ##able ##s cafe café naive CAFÉ 电 影 , . 电影"
)
LONG = "the film was very good , not bad . "
TEXTS = [
    "The film was good", "CAFÉ café naïve cafe", "电影 is bad", "unable films", LONG * 6,
    "good [SEP] bad [MASK] x", "", "new york <tag> , newyork",
]  # fmt: skip
PAIRS = [("good film", "bad"), (LONG * 4, "not bad"), ("good", LONG * 4), (LONG * 3, LONG * 5)]
LENGTHS = (8, 16)


def write_bert(folder: Path, *, changes: dict | None = None, **options: object) -> Path:
    """Save a BERT's config and tokenizer; `changes` go into tokenizer_config.json alone."""
    from transformers import BertConfig, BertTokenizer

    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *PIECES.split()])}
    BertTokenizer(vocab=vocabulary, **options).save_pretrained(folder)
    BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
    return folder


def ours(folder: Path, max_length: int):
    config = BackboneConfig(name=str(folder), pretrained=False)
    return load_backbone(config, max_length=max_length).preprocess


def check_same_ids(folder: Path, tmp_path: Path) -> None:
    """Compare with the library on texts and pairs, as loaded and as saved and loaded again."""
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(folder)
    for max_length in LENGTHS:
        preprocess = ours(folder, max_length)
        preprocess.save(tmp_path)
        for raws, columns in ((TEXTS, [TEXTS]), (PAIRS, list(zip(*PAIRS, strict=True)))):
            options = dict(truncation=True, max_length=max_length, padding=True)
            wanted = library(*map(list, columns), return_tensors="np", **options)
            for found in (preprocess(raws), load_preprocess(tmp_path)(raws)):
                assert set(found) == set(wanted)
                for name, array in found.items():
                    np.testing.assert_array_equal(array, wanted[name], err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        dict(do_lower_case=True),
        dict(do_lower_case=False),
        dict(do_lower_case=True, strip_accents=False),
        dict(do_lower_case=False, strip_accents=True),
        dict(tokenize_chinese_chars=False),
        dict(truncation_side="left"),
        dict(model_input_names=["input_ids", "attention_mask"]),
    ],
    ids=str,
)
def test_ids_equal_the_library(options, tmp_path) -> None:
    check_same_ids(write_bert(tmp_path / "bert", **options), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(truncation_side="left"),
        dict(do_lower_case=False),
        dict(do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast"),
        dict(strip_accents=False),
        dict(model_max_length=16),
        dict(truncation_strategy="longest_first", stride=0, max_length=512),
    ],
    ids=str,
)
def test_a_setting_in_the_tokenizer_config_alone_acts_as_in_the_library(changes, tmp_path) -> None:
    check_same_ids(write_bert(tmp_path / "bert", changes=changes), tmp_path)


def test_added_tokens_equal_the_library(tmp_path) -> None:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = write_bert(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("new york", single_word=True), AddedToken("x", lstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tag>"]})
    tokenizer.save_pretrained(folder)
    check_same_ids(folder, tmp_path)


def test_what_tokenizer_json_says_of_cutting_acts_as_in_the_library(tmp_path) -> None:
    folder = write_bert(tmp_path / "bert")
    file = folder / "tokenizer.json"
    cut = dict(direction="Left", max_length=5, strategy="LongestFirst", stride=2)
    padding = dict(
        strategy={"Fixed": 40}, direction="Right", pad_to_multiple_of=None, pad_id=0,
        pad_type_id=0, pad_token="[PAD]",
    )  # fmt: skip
    plain = json.loads(file.read_text()) | {"truncation": cut, "padding": padding}
    file.write_text(json.dumps(plain))
    check_same_ids(folder, tmp_path)


def test_roberta_ids_equal_the_library(tmp_path) -> None:
    from transformers import RobertaConfig, RobertaTokenizer

    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(chr, range(33, 127)), "Ġ", "Ġg", "oo"]
    vocabulary = {name: index for index, name in enumerate(names)}
    for side in ("right", "left"):
        folder = tmp_path / side
        RobertaTokenizer(
            vocab=vocabulary, merges=[("Ġ", "g"), ("o", "o")], truncation_side=side,
            add_prefix_space=side == "left",
        ).save_pretrained(folder)  # fmt: skip
        RobertaConfig(
            vocab_size=len(names), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64, type_vocab_size=1,
        ).save_pretrained(folder)  # fmt: skip
        check_same_ids(folder, tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(padding_side="left"), "padding_side='left'"),
        (dict(split_special_tokens=True), "split_special_tokens=True"),
        (dict(truncation_strategy="only_second"), "truncation_strategy='only_second'"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_obeyed_is_refused(changes, reason, tmp_path) -> None:
    folder = write_bert(tmp_path / "bert", changes=changes)
    with pytest.raises(UserError, match=f"{reason}.*tokenizer_config.json of a local copy"):
        ours(folder, 16)


def test_a_tokenizer_made_for_shorter_texts_is_refused(tmp_path) -> None:
    folder = write_bert(tmp_path / "bert", changes=dict(model_max_length=12))
    assert ours(folder, 12).max_length == 12
    with pytest.raises(UserError, match=r"data.max_length=13 is more than the 12 tokens"):
        ours(folder, 13)
