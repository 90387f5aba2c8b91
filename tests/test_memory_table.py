"""Many methods' forecasts side by side: the rows, the dry run that prints them, the page of them."""

import importlib.util
import json
from pathlib import Path

import pytest

from mdpd_deploy.cli import main
from mdpd_deploy.commands.train import _print_plan, plan
from mdpd_deploy.config import check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train import default_entries, entry_configs, forecast_methods
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.memory.table import paper_figure

ROOT = Path(__file__).parents[1]
LABELS = [entry.label for entry in default_entries()]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("memory_script", ROOT / "benchmarks/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tiny_vit):
    return check_config({"backbone": {"name": str(tiny_vit)}, "train": {"batch": 4}})


def test_rows_are_forecasts(config):
    probe, mdpd = forecast_methods(entry_configs(config, ["probe", "mdpd"]), Classify.numbered(3))
    assert (probe.method, mdpd.method) == ("probe", "mdpd:unipt")
    assert mdpd.forecast == forecast(config, Classify.numbered(3))
    assert probe.forecast.trained == probe.forecast.deployed_delta == 32 * 3 + 3
    assert sum(probe.forecast.parts.values()) == probe.forecast.peak_bytes


def test_counts_are_those_of_a_run(tiny_run, tiny_side_run):
    for run in (tiny_run, tiny_side_run):
        word = f"{run.config.method}:{run.config.side.name}"
        outputs = run.task.width
        configs = entry_configs(run.config, [word])
        (row,) = forecast_methods(configs, Classify.numbered(outputs))
        params = run.summary["params"]
        assert row.forecast.trained == params["trained"]
        assert row.forecast.deployed_delta == params["deployed_delta"]
        assert row.forecast.peak_bytes == run.summary["memory"]["forecast_bytes"]


VIT_B = {"name": "timm:vit_base_patch16_224.augreg_in21k", "pretrained": False}


@pytest.mark.parametrize(
    ("method", "side", "batch", "wanted"),
    [
        ("probe", {}, 32, "0.6 (MDPD)"),
        ("side:lst", {"name": "lst"}, 32, "2.7 at 2.38 M (DTL, Tab. 4)"),
        ("side:lst", {"name": "lst", "reduction": 2}, 32, None),
        ("mdpd:unipt", {}, 32, "2.1 at 5.50 M (MDPD, Tab. 3)"),
        ("mdpd:unipt", {"reduction": 8}, 32, None),
        ("mdpd:sherl", {"name": "sherl"}, 32, None),
        ("probe", {}, 16, None),
    ],
)
def test_the_papers_figures_stand_beside_their_own_setting_only(method, side, batch, wanted):
    given = {"backbone": VIT_B, "side": side, "train": {"batch": batch}}
    assert paper_figure(method, check_config(given)) == wanted
    given["backbone"] = {"name": "timm:vit_large_patch16_224", "pretrained": False}
    assert paper_figure(method, check_config(given)) is None


def test_a_forecast_of_the_papers_setting_shows_their_figures(capsys):
    words = ["compare", "--forecast", "--backbone", VIT_B["name"], "--methods", "probe,norms"]
    words += ["--set", "backbone.pretrained=false"]
    assert main([*words, "--json"]) == 0
    probe, norms = json.loads(capsys.readouterr().out)
    assert (probe["papers"], norms["papers"]) == ("0.6 (MDPD)", None)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "papers, GB" in printed and "0.6 (MDPD)" in printed
    assert "The papers measured on CUDA" in printed
    assert main([*words, "--batch", "16"]) == 0
    assert "papers" not in capsys.readouterr().out


def test_what_does_not_fit_says_why(config):
    config = config.model_copy(update={"side": config.side.model_copy(update={"reduction": 5})})
    configs = entry_configs(config, ["probe", "unipt"])
    probe, unipt = forecast_methods(configs, Classify.numbered(3))
    assert probe.forecast and probe.reason is None
    assert unipt.forecast is None
    assert "side.reduction=5 does not fit a backbone of width 32" in unipt.reason
    with pytest.raises(UserError, match="unknown 'nope'"):
        entry_configs(config, ["probe", "nope"])


def test_a_dry_run_forecasts_its_own_method_alone(image_options, capsys):
    words = [f"--{name}={value}" for name, value in image_options.items()]
    assert main(["train", *words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "memory forecast" in printed and "--all-methods" in printed
    assert "mdpd:sherl" not in printed and "bitfit" not in printed
    assert main(["train", *words, "--dry-run", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["memory_table"] == [] and made["forecast_bytes"] > 0
    assert main(["train", *words, "--all-methods"]) == 2
    assert "a table of --dry-run" in capsys.readouterr().err


def test_a_method_that_fails_is_a_row_and_the_others_are_forecast(config, monkeypatch):
    """Whatever goes wrong in a rival, and be it a bug, the plan of the others is not lost."""

    def fail(*_, **__):
        raise AttributeError("no attribute fc1")

    monkeypatch.setattr("peft.LoraConfig", fail)
    configs = entry_configs(config, ["lora", "probe"])
    lora, probe = forecast_methods(configs, Classify.numbered(3))
    assert lora.forecast is None
    assert lora.reason == "internal error: AttributeError: no attribute fc1"
    assert probe.forecast is not None


# One of each kind of block among timm's plain vision transformers that we accept.
KINDS = {
    "aimv2_large_patch14_224": {},  # gate and value apart, RMSNorm
    "beit3_base_patch16_224": {},  # norms inside attention and MLP
    "test_vit4": {},  # RMSNorm after the pooling
    "vit_base_patch16_rpn_224": {},  # norms after attention and MLP, no LayerScale
    "vit_base_patch16_radio_v3": {},  # no final norm
    "vit_dlittle_patch16_reg1_gap_256": {},  # differential attention, an MLP of odd width
    "vit_giant_patch14_dinov2": {"mlp_ratio": 5.0},  # gate and value in one map
}


@pytest.mark.parametrize(("name", "more"), KINDS.items())
def test_what_looks_into_blocks_answers_beside_every_kind_of_block(name, more, tmp_path):
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8} | more
    written = {"timm_model": name, "timm_kwargs": {**shape, "num_classes": 0}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    backbone = {"name": str(tmp_path), "pretrained": False}
    config = check_config({"backbone": backbone, "train": {"batch": 2}})
    words = ["lora", "ia3", "prefix", "norms", "side:lst"]  # what the others do, one of these does
    rows = forecast_methods(entry_configs(config, words), Classify.numbered(3))
    (prefix,) = [row for row in rows if row.forecast is None]
    assert prefix.method == "prefix" and "use --method prompt" in prefix.reason


def test_a_dry_run_counts_without_training_and_has_every_method(text_options, capsys):
    made = plan(all_methods=True, **text_options)
    assert made.examples == {"train": 60, "validation": 30}
    assert (made.steps, made.steps_per_epoch) == (6, 8)
    assert made.params["trained"] == sum(made.params[k] for k in ("side", "norms", "head"))
    assert [row.method for row in made.memory_table] == LABELS
    own = {row.method: row for row in made.memory_table}["mdpd:unipt"]
    assert own.forecast.peak_bytes == made.forecast_bytes
    _print_plan(made, as_json=True)
    assert json.loads(capsys.readouterr().out)["memory_table"][0]["method"] == LABELS[0]
    _print_plan(made, as_json=False)
    printed = capsys.readouterr().out
    assert printed.count("(this run)") == 1
    assert " mdpd:unipt (this run) " in printed
    for label in LABELS:
        assert f" {label} " in printed or f"{label} does not fit" in printed


def rows_of(markdown):
    """Return the cells of every table row by its method."""
    lines = [line for line in markdown.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def test_a_table_of_the_page(script, tiny_vit):
    setting = script.Setting("tiny", str(tiny_vit), 3, 5)
    text = script.table(setting, ["side:dtlv2", "probe", "side:unipt"])
    assert text == script.table(setting, ["side:dtlv2", "probe", "side:unipt"])
    rows = rows_of(text)
    assert list(rows) == ["probe", "side:dtlv2"]  # least memory first
    both = [setting.rows(["probe"], precision)[0].forecast for precision in ("fp32", "bf16")]
    peaks = [f"{found.peak_bytes / 1e9:.2f}" for found in both]
    assert rows["probe"] == ["165", "165", *peaks]
    assert "`side:unipt` does not fit: side.reduction=3 does not fit" in text


def test_the_page_is_complete(script):
    """A new method or side network makes this fail: write the page again with its command."""
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.COMMAND in text.split("\n\n")[1]
    tables = [part for part in text.split("\n## ")[1:] if "| trained |" in part]
    assert len(tables) == 4
    for part in tables:
        shown = set(rows_of(part))
        missing = {label for label in LABELS if f"`{label}`" not in part}
        assert not missing, f"{script.COMMAND} writes the rows of {missing}"
        assert shown <= set(LABELS)


@pytest.mark.parametrize(
    ("word", "papers"), [("probe", "0.6 (MDPD)"), ("side:dtlv2-ls", "1.8 at 0.04 M (DTL, Tab. 4)")]
)
def test_the_page_is_up_to_date(script, tmp_path, word, papers):
    """Two quick rows of the first table, as they would be written now."""
    setting = script.settings(tmp_path)[0]
    first = script.PAGE.read_text(encoding="utf-8").split(setting.heading)[1]
    row = rows_of(script.table(setting, [word]))[word]
    shown = rows_of(first.split("\n## ")[0])
    assert row == shown[word]
    assert (row[-1], shown["norms"][-1]) == (papers, "–")
