"""Long texts: the tokens of the library's own truncation, in time and memory that stay small."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from mdpd_deploy.data import truncation
from mdpd_deploy.data.preprocess import TextPreprocess

NAMES = ("input_ids", "attention_mask", "token_type_ids")
WORDS = [
    "the", "film", "'s", "plot-twist", "naïve", "电影", "café", ",", "1,540", "don't", " " * 90,
    "a" * 150, "\u0301", "\u2028", "ab" * 90, "\n\n", "." * 40,
]  # fmt: skip
CORPUS = ["the film was good and a dull mess, isn't it? 1,540 naïve cafés 电影", "aaaa abab"] * 30


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    return tokenizer


def byte_pairs():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def pieces_over_blanks():
    """Whose words are not split at blanks, so that no cut is safe."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def made_up(chosen, size):
    words = []
    while sum(map(len, words)) < size:
        words.append(chosen.choice(WORDS))
    return chosen.choice([" ", "", "  "]).join(words)


@pytest.mark.parametrize("make", [word_pieces, byte_pairs, pieces_over_blanks])
@pytest.mark.parametrize("most", [9, 32])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_tokens_kept_are_those_of_the_library(make, most, side, monkeypatch):
    monkeypatch.setattr(truncation, "SHORTEST", 16)  # texts are cut that the library can take
    tokenizer, chosen = make(), random.Random(most)
    tokenizer.enable_truncation(most, strategy="longest_first", direction=side)
    ours = TextPreprocess(tokenizer, NAMES, most, pad_id=0)
    cut = 0
    for _ in range(30):
        first, second = (made_up(chosen, chosen.choice([20, 200, 400])) for _ in range(2))
        for text in (first, (first, second)):
            expected, found = tokenizer.encode_batch([text])[0], ours([text])
            assert found["input_ids"].tolist() == [expected.ids]
            assert found["attention_mask"].tolist() == [expected.attention_mask]
            assert found["token_type_ids"].tolist() == [expected.type_ids]
            cut += truncation.cut_text(ours.tokenizer, text, most) != text
    assert cut > 5 or make is pieces_over_blanks


def test_two_long_texts_are_a_pair_that_fits_into_memory(run_python):
    """The library's truncation asks for every part of one text beside every part of the other."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from test_truncation import NAMES, TextPreprocess, word_pieces
preprocess = TextPreprocess(word_pieces(), NAMES, 8, pad_id=0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)
texts = ".,", "?!"
print(preprocess([tuple(text * 25_000 for text in texts)])["input_ids"].shape)
"""
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (0, "(1, 8)\n"), done.stderr[-300:]


def test_only_a_beginning_of_a_long_text_is_tokenised():
    preprocess = TextPreprocess(word_pieces(), NAMES, 32, pad_id=0)
    long = "the film was good, " * 5000
    cut = truncation.cut_text(preprocess.tokenizer, long, 32)
    assert len(cut) == truncation.SHORTEST
    assert truncation.cut_text(preprocess.tokenizer, ("the film", long), 32) == ("the film", cut)
    assert truncation.cut_text(preprocess.tokenizer, (long, "the film"), 32) == (cut, "the film")
    blanks = " " * 20_000 + "the film"  # the tokens come at the end
    assert truncation.cut_text(preprocess.tokenizer, blanks, 32) == blanks
    whole, short = (preprocess([text])["input_ids"] for text in (long, long[:2000]))
    np.testing.assert_array_equal(whole, short)
