"""Typing mistakes are answered before torch is loaded; the lists of names are the registries'."""

import json

import pytest

from mdpd_deploy.commands import names

ASK = """
import json, sys
from mdpd_deploy.cli import main
codes = [main(["train", *words]) for words in json.loads(sys.argv[1])]
print(json.dumps([codes, "torch" in sys.modules]))
"""
MISTAKES = {
    ("--method", "mdpf"): "method (--method): unknown 'mdpf'. Did you mean 'mdpd'?",
    ("--side", "unipd"): "side.name (--side): unknown 'unipd'. Did you mean 'unipt'?",
    ("--task", "clasify"): "--task: unknown 'clasify'. Did you mean 'classify'?",
    ("--backbone", "vit_base"): "backbone.name='vit_base' is neither an existing folder nor",
}


def test_the_lists_are_what_the_registries_hold():
    from mdpd_deploy.backbones.family import BACKBONES
    from mdpd_deploy.sides import SIDES
    from mdpd_deploy.train.methods import METHODS

    assert sorted(names.METHODS) == sorted(METHODS)
    assert sorted(names.SIDES) == sorted(SIDES)
    known = " ".join(family.names for family in BACKBONES.values())
    assert all(scheme in known for scheme in names.BACKBONES)


def test_a_wrong_name_is_answered_before_torch_is_loaded(tmp_path, run_python):
    words = [list(pair) for pair in MISTAKES] + [["--dry-run", "--method", "mdpf"]]
    done = run_python("-c", ASK, json.dumps(words), cwd=tmp_path)
    codes, torch_loaded = json.loads(done.stdout)
    assert codes == [2] * len(words) and not torch_loaded
    said = done.stderr.splitlines()
    assert len(said) == len(words)
    for line, start in zip(said, MISTAKES.values(), strict=False):
        assert line.startswith(f"error: {start}")


def test_the_door_of_training_loads_no_torch(run_python):
    code = "import sys, mdpd_deploy.train; print('torch' in sys.modules)"
    assert run_python("-c", code).stdout == "False\n"


def test_a_backbone_that_does_not_exist_is_told_before_the_data_are_read(tmp_path, capsys):
    from mdpd_deploy.cli import main

    words = ["--backbone", "timm:vit_base_patch16_242", "--task", "classify", "--data", "nowhere"]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert "timm has no model 'vit_base_patch16_242'. Near: vit_base_patch16_2" in said


def test_notes_reach_stderr_beside_json(tmp_path, image_options, capsys):
    from mdpd_deploy.cli import main

    words = [f"--{name}={value}" for name, value in image_options.items()]
    words += ["--steps", "1", "--set", "data.limit=20", "--out", str(tmp_path / "run"), "--json"]
    assert main(["train", *words]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert any("validation has" in note for note in summary["notes"])
    assert all(note in err.splitlines() for note in summary["notes"])
    assert (
        "16 training examples beyond data.limit" in err
    )  # what data.limit leaves out is in the inventory's line


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "hf:bert-base-uncased"])
def test_known_names_pass(name):
    from mdpd_deploy.config import check_config

    names.check_names(check_config({"backbone": {"name": name}}))
