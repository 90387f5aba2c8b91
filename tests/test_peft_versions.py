"""A peft that lacks a method: that method is a sentence, and everything else goes on."""

import json
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from mdpd_deploy.adapters.library import TESTED, from_peft
from mdpd_deploy.cli import main
from mdpd_deploy.commands.study_plan import method_labels, shared_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.train import Entry

NEEDS = {
    "lora": "LoraModel", "adalora": "AdaLoraConfig", "ia3": "IA3Model",
    "prompt": "PromptEmbedding", "prefix": "PrefixEncoder",
}  # fmt: skip


@pytest.fixture
def lacking(monkeypatch):
    """Call it to take a name out of peft, as a version without it."""

    def remove(name):
        monkeypatch.delattr(import_module("peft"), name)

    return remove


@pytest.mark.parametrize(("method", "name"), NEEDS.items())
def test_training_with_it_is_one_sentence(
    method, name, lacking, tiny_bert, sentence_folder, tmp_path, capsys
):
    lacking(name)
    words = ["train", "--task", "classify", "--data", str(sentence_folder), "--text", "sentence"]
    words += ["--backbone", str(tiny_bert), "--steps", "1", "--out", str(tmp_path / "run")]
    assert main([*words, "--method", method, "--set", "data.max_length=24"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"the installed peft {version('peft')} has no usable" in line and name in line
    assert f"pip install peft=={TESTED}" in line
    assert not (tmp_path / "run").exists()


def test_lists_of_methods_say_so_in_its_row(lacking, tiny_vit, digit_folder, capsys, monkeypatch):
    lacking("IA3Model")
    few = [Entry(name) for name in ("probe", "ia3", "lora")]
    monkeypatch.setattr(import_module("mdpd_deploy.train.fit"), "default_entries", lambda: few)
    common = ["--backbone", str(tiny_vit), "--batch", "4", "--json"]
    data = ["--task", "classify", "--data", str(digit_folder)]
    assert main(["train", *common, *data, "--dry-run", "--all-methods"]) == 0
    table = json.loads(capsys.readouterr().out)["memory_table"]
    assert main(["compare", *common, "--forecast", "--methods", "probe,ia3,lora"]) == 0
    listed = json.loads(capsys.readouterr().out)
    for rows in (table, listed):
        found = {row["method"]: row for row in rows}
        assert "has no usable" in found["ia3"]["reason"] and found["ia3"]["forecast"] is None
        assert found["lora"]["forecast"] and found["probe"]["forecast"]


def test_all_methods_are_those_that_are_there(lacking, tiny_vit):
    lacking("IA3Model")
    said = []
    base = shared_config(None, [], {"backbone": tiny_vit})[0]
    labels = method_labels(base, ["all"], said.append)
    assert "ia3" not in labels and {"probe", "lora", "prompt"} <= set(labels)
    assert any(re.match("ia3 is left out: the installed peft", line) for line in said)


def test_a_peft_that_cannot_be_imported_is_a_sentence_too():
    with pytest.raises(UserError, match=r"has no usable Gone \(No module named"):
        from_peft("Gone", module="peft.gone")


def test_the_tested_version_is_the_pinned_one():
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert f"peft=={TESTED}\n" in pins
