"""Tokens counted before training: what is cut is said, and the memory forecast knows the longest."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.commands.train import build_config
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.data import lengths
from mdpd_deploy.data.examples import Split
from mdpd_deploy.data.lengths import TextLengths, text_lengths
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.setup import prepare


@pytest.fixture(scope="module")
def preprocess(tiny_bert):
    return load_backbone(BackboneConfig(name=str(tiny_bert)), max_length=8).preprocess


def split(texts: list) -> Split:
    return Split(texts, np.zeros(len(texts), dtype=np.int64))


TEXTS = ["good film " * n for n in range(1, 21)]  # 2 n words and 2 special tokens


def test_lengths_equal_the_library(preprocess, tiny_bert) -> None:
    library = AutoTokenizer.from_pretrained(tiny_bert)
    tokens = [len(ids) for ids in library(TEXTS)["input_ids"]]
    found = text_lengths(split(TEXTS), preprocess)
    assert (found.examples, found.counted, found.longest) == (20, 20, max(tokens))
    assert found.cut == sum(n > 8 for n in tokens) == 17
    assert found.p95 == sorted(tokens)[18]  # 19 of 20 have at most so many
    assert len(preprocess(TEXTS)["input_ids"][0]) == 8  # counting leaves the cut as it was


def test_lengths_of_pairs(preprocess, tiny_bert) -> None:
    pairs = [("good", "bad film"), ("good " * 9, "bad " * 4)]
    library = AutoTokenizer.from_pretrained(tiny_bert)
    tokens = [len(library(*pair)["input_ids"]) for pair in pairs]
    found = text_lengths(split(pairs), preprocess)
    assert (found.longest, found.cut) == (max(tokens), 1)


def test_a_large_split_is_sampled_and_says_so(preprocess, monkeypatch) -> None:
    monkeypatch.setattr(lengths, "MOST_TEXTS", 100)
    texts = ["good film"] * 999 + ["good film good"]
    found = text_lengths(split(texts), preprocess)
    assert (found.examples, found.counted) == (1000, 100)
    assert found.longest == 5  # the longest is counted whether it is in the sample or not
    assert "of a sample of 100 of 1,000 texts" in str(found)


def test_few_long_texts_are_sampled_too(preprocess, monkeypatch) -> None:
    monkeypatch.setattr(lengths, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(lengths, "MOST_OF_A_TEXT", 400)
    found = text_lengths(split(["good " * 2000] * 30), preprocess)
    assert (found.counted, found.cut, found.longest) == (2, 2, 82)


def test_the_sentence() -> None:
    some = TextLengths(8551, 8551, p95=24, longest=47, cut=12, max_length=32)
    assert str(some) == (
        "of 8,551 texts, 95 % have at most 24 tokens, the longest 47; 12 (0.1%) are cut to "
        "data.max_length=32"
    )
    assert str(TextLengths(9, 9, 4, 5, 0, 32)).endswith("the longest 5; none are cut")


def test_the_forecast_is_of_the_longest_batch_of_the_data(tiny_bert, sentence_folder) -> None:
    words = {"task": "classify", "data": sentence_folder, "text": "sentence", "method": "norms",
             "backbone": tiny_bert, "batch": 8}  # fmt: skip
    for options, tokens in (([], 10), (["data.pad=max"], 48), (["data.max_length=7"], 7)):
        setup = prepare(build_config(None, ["data.max_length=48", *options], words))
        assert setup.lengths["train"].longest == 10
        assert setup.text_length == tokens


def test_a_run_measures_what_was_forecast(tiny_text_run) -> None:
    summary = tiny_text_run.summary
    found = summary["tokens"]["train"]
    assert (found["counted"], found["cut"], found["max_length"]) == (60, 0, 24)
    memory, config = summary["memory"], tiny_text_run.config
    longest = forecast(config, Classify.numbered(2), text_length=found["longest"])
    assert memory["forecast_bytes"] == longest.peak_bytes
    assert longest.peak_bytes < forecast(config, Classify.numbered(2)).peak_bytes
    assert 0.9 < memory["peak_live_bytes"] / memory["forecast_bytes"] <= 1.02
    assert any(
        note.startswith("train: of 60 texts, 95 % have at most") for note in summary["notes"]
    )
    assert "train: of 60 texts, 95 % have" in (tiny_text_run.path / "report.html").read_text()
