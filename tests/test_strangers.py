"""What a stranger's bundle, run or file may do to whoever looks at it."""

import json
import logging
import resource
import shutil
import time

import onnx
import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import NFKC, Lowercase, Prepend, Replace, Sequence

from mdpd_deploy import load_bundle
from mdpd_deploy.artifacts.manifest import graph_notes
from mdpd_deploy.artifacts.sealed import seal
from mdpd_deploy.cli import main
from mdpd_deploy.data.preprocess import load_preprocess
from mdpd_deploy.data.tokenizer_limits import check_tokenizer
from mdpd_deploy.errors import UserError
from mdpd_deploy.report.page import tag
from mdpd_deploy.report.terminal import Console
from mdpd_deploy.text import shown

EVIL = "cat\x1b]0;owned\x07\x9b2J\u202egnp.\u2066"
PLAIN = "cat\\x1b]0;owned\\x07\\x9b2J\\u202egnp.\\u2066"


def test_what_is_not_visible_is_spelt_out_and_words_stay():
    assert shown(EVIL) == PLAIN
    for word in ("naïve 猫\u3000犬", "می\u200cخواهم", "👩\u200d🚀", "a\u00a0b", "two\nlines"):
        assert shown(word) == word


@pytest.fixture(scope="module")
def evil_bundle(tiny_bundle, tmp_path_factory):
    """A sound bundle whose first class has a name that drives terminals."""
    pytest.importorskip("onnxruntime", reason="runs exported graphs")
    folder = shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("evil") / "b")
    facts = json.loads((folder / "manifest.json").read_text())
    facts["labels"] = [f"{EVIL}{index}" for index in range(len(facts["labels"]))]
    facts["verification"]["parity"]["note"] += EVIL
    proto = onnx.load(folder / "model.onnx")
    onnx.helper.set_model_props(proto, graph_notes(facts))
    onnx.save(proto, folder / "model.onnx")
    for name in ("schema", "files", "caches"):
        del facts[name]
    seal(folder, facts)
    return folder


@pytest.mark.parametrize("words", [[], ["--top", "2"], ["--json"]])
def test_class_names_do_not_drive_the_terminal(words, evil_bundle, digit_folder, capsys):
    picture = next((digit_folder / "validation").rglob("*.png"))
    assert main(["predict", str(evil_bundle), str(picture), *words]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and "owned" in out
    if words == ["--json"]:
        assert json.loads(out)["predictions"][0]["label"].startswith(EVIL)


def test_no_verb_on_a_bundle_drives_the_terminal(evil_bundle, capsys):
    assert main(["verify", str(evil_bundle)]) == 1
    assert main(["predict", str(evil_bundle), EVIL]) == 2
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()


def test_messages_and_pages_show_what_is_there(capsys):
    from rich.table import Table

    from mdpd_deploy.cli import _messages

    with _messages(debug=False):
        logging.getLogger("mdpd_deploy.test").info("class %s", EVIL)
    assert capsys.readouterr().err == f"class {PLAIN}\n"
    assert tag("td", EVIL, title=EVIL) == f'<td title="{PLAIN}">{PLAIN}</td>'
    table = Table(title=EVIL)
    table.add_column(f"[bold]{EVIL}")
    table.add_row("[/] " + EVIL)
    Console(width=200).print(table)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and r"[bold]cat\x1b" in out and "[/]" in out


# --- what takes time and memory ------------------------------------------------------------------


def replaced(times, count):
    return [Replace("a", "a" * times) for _ in range(count)]


def tokenizer_with(folder, normalizer):
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_str(path.read_text())
    tokenizer.normalizer = normalizer
    path.write_text(tokenizer.to_str())


@pytest.fixture
def preprocessor(tiny_text_bundle, tmp_path):
    return shutil.copytree(tiny_text_bundle.path / "preprocessor", tmp_path / "preprocessor")


@pytest.mark.parametrize(
    "normalizer",
    [
        Sequence(replaced(50, 4)),
        Sequence([Sequence(replaced(50, 2)), Sequence([Lowercase(), Sequence(replaced(50, 2))])]),
        Replace("a", "b" * 101),
        Sequence([Prepend("x" * 60), Prepend("y" * 60)]),
    ],
    ids=["four times", "nested", "at once", "prepended"],
)
def test_a_tokenizer_that_grows_texts_is_refused(normalizer, preprocessor):
    tokenizer_with(preprocessor, normalizer)
    with pytest.raises(UserError, match="more than 100 letters of one") as caught:
        load_preprocess(preprocessor)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "settings",
    [
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 100}},
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": "AAAAAHh4" + "eHh4" * 40,
            }
        },
        {"model": {"max_input_chars_per_word": 10**9}},
        {"model": {"max_input_chars_per_word": "many"}},
    ],
    ids=["between letters", "a table of sentencepiece", "long words", "no number"],
)
def test_other_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(ValueError, match="more than"):
        check_tokenizer(json.dumps(settings).encode())


def test_normalizers_that_people_use_are_kept(preprocessor):
    normalizer = Sequence([Replace("``", '"'), NFKC(), Prepend("▁"), Replace(" ", "▁")])
    tokenizer_with(preprocessor, normalizer)
    assert load_preprocess(preprocessor)(["the film"])["input_ids"].shape[0] == 1


def nested_lists(count):
    return "[" + ",".join(["[]"] * count) + "]"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", nested_lists(4_000_000)),  # 12 MB
        ("labels", nested_lists(200_000)),
        ("tasks", nested_lists(200_000)),
        ("data", '{"columns":' + nested_lists(4_000_000) + "}"),
        ("files", "{" + ",".join(f'"{index}":[]' for index in range(400_000)) + "}"),
        ("versions", "{" + ",".join(f'"{index}":[]' for index in range(400_000)) + "}"),
    ],
    ids=["12 MB of lists", "lists", "tasks", "12 MB inside", "files", "versions"],
)
def test_a_manifest_of_lists_is_refused_soon(field, value, tiny_bundle, tmp_path):
    manifest = json.loads((tiny_bundle.path / "manifest.json").read_text())
    manifest[field] = "HERE"
    text = json.dumps(manifest).replace('"HERE"', value)
    (tmp_path / "manifest.json").write_text(text)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError) as caught:
        load_bundle(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert time.process_time() - start < 10, "a wide margin: it takes a second"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
