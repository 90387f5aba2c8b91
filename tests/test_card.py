"""What a backbone sees and its licence are said at the start, in the plan and in the report."""

import json
import shutil

import pytest

from mdpd_deploy import fit
from mdpd_deploy.backbones import card_of, load_backbone
from mdpd_deploy.cli import main
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import BackboneConfig

TINY = "non-commercial research"


def card(name, **options):
    config = BackboneConfig(name=str(name), **options)
    return card_of(load_backbone(config, max_length=24, fake=True), config)


def test_the_built_in_backbone_says_that_it_is_for_trying_out():
    found = card("builtin:vit-xs-tin32")
    assert found.sees == "pictures of 32 × 32 pixels" and TINY in found.licence
    assert "for trying out" in found.advice and "--backbone timm:" in found.advice


def test_timm_knows_the_licence_of_its_own_weights_only(tmp_path):
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    found = card(name)
    assert (found.sees, found.licence) == ("pictures of 224 × 224 pixels", "apache-2.0")
    assert found.advice is None
    assert "not stated" in card(name, weights=str(tmp_path / "own.safetensors")).licence
    assert "random" in card(name, pretrained=False).licence


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        ("---\nlanguage: en\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: cc-by\x1b[2Jnc\n---\n", "cc-by\\x1b[2Jnc"),
        ("license: mit\n", "not stated"),
        (None, "not stated"),
    ],
)
def test_a_folder_says_it_in_its_model_card(tiny_bert, tmp_path, readme, said):
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_bert, folder)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    found = card(folder)
    assert found.name == "encoder" and found.licence.startswith(said)
    assert found.sees == "at most 24 tokens of a text (data.max_length)"


def test_train_says_it_at_the_start_in_the_summary_and_in_the_report(digit_folder, tmp_path, capfd):
    out = tmp_path / "run"
    fit(task="classify", data=digit_folder, method="probe", steps=1, batch=4, out=out)
    first, *others = capfd.readouterr().err.splitlines()
    assert first.startswith("backbone builtin:vit-xs-tin32 · sees pictures of 32 × 32 pixels")
    assert TINY in first and any("for trying out" in line for line in others)
    summary = json.loads((out / "summary.json").read_text())
    assert TINY in summary["backbone"]["licence"]
    assert any("--backbone timm:" in note for note in summary["notes"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "sees pictures of 32 × 32 pixels" in page and TINY in page and "for trying out" in page


def test_the_digits_need_no_advice_but_the_licence_is_said():
    found = plan(task="digits", method="probe")
    assert TINY in found.licence and not any("for real work" in note for note in found.notes)


def test_the_plan_says_it_before_anything_is_trained(text_options, tiny_bert, capsys):
    words = ["--data", text_options["data"], "--text", "sentence", "--backbone", tiny_bert]
    words += ["--set", "data.max_length=24", "--method", "probe", "--dry-run", "--json"]
    assert main(["train", "--task", "classify", *map(str, words)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sees"] == "at most 24 tokens of a text (data.max_length)"
    assert "not stated" in plan["licence"]
