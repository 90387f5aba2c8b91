"""A validation set of one label only: no correlation, said so at every place that shows a score."""

import json

import pytest
from typer.testing import CliRunner

from mdpd_deploy import export_run
from mdpd_deploy.artifacts.run import read_metrics
from mdpd_deploy.cli import app

CORRELATIONS = ("pearson_spearman", "pearson", "spearman")


@pytest.fixture(scope="module")
def constant(tmp_path_factory, many):
    """A folder of scored sentences whose validation scores are all 1.5."""
    folder = tmp_path_factory.mktemp("constant")
    lines = (many / "scores" / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join(lines[:60]))
    texts = [line.rpartition(",")[0] for line in lines[100:106]]
    held = [lines[0], *(f"{text},1.5" for text in texts)]
    (folder / "validation.csv").write_text("\n".join(held))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, constant, text_options, fit_in):
    out = tmp_path_factory.mktemp("runs") / "constant"
    return fit_in(
        out, text_options, task="regress", data=constant, steps=4, set=["train.eval_every=1"]
    )


def test_the_summary_has_no_number_where_there_is_none(run) -> None:
    measured = json.loads((run.path / "summary.json").read_text())["metrics"]
    for who in ("deployed", "side"):
        assert [measured[who][name] for name in CORRELATIONS] == [None] * 3
        assert measured[who]["rmse"] > 0
    assert "NaN" not in (run.path / "metrics.jsonl").read_text()
    lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "deployed" in line]
    assert [line["deployed"]["pearson"] for line in lines] == [None] * 4


def test_weights_are_kept_all_the_same(run) -> None:
    assert run.summary["best_step"] >= 1
    assert (run.path / "checkpoints" / "best.safetensors").is_file()


def test_report_and_tables_say_undefined(run, constant) -> None:
    assert "undefined" in (run.path / "report.html").read_text()
    done = CliRunner().invoke(app, ["eval", str(run.path), "--data", str(constant)])
    assert done.exit_code == 0, done.output
    assert done.output.count("undefined") == 6  # three correlations of two models


def test_the_gates_pass_on_what_is_undefined_for_both(run, tmp_path, constant) -> None:
    bundle = export_run(run.path, out=tmp_path / "bundle")
    gate = bundle.manifest["verification"]["metric"]
    assert gate["verdict"] == "passed"
    assert "pearson_spearman undefined on validation, 6 examples" in gate["note"]
    words = ["verify", str(bundle.path), "--eval-data", str(constant)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_training_prints_what_is_undefined(constant, text_options, tmp_path) -> None:
    words = [
        "train", "--task", "regress", "--data", str(constant), "--text", "sentence",
        "--backbone", str(text_options["backbone"]), "--steps", "1", "--out", str(tmp_path / "r"),
        "--set", "data.max_length=24", "--method", "norms",
    ]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "undefined" in done.stdout
    assert "pearson_spearman on validation, 6 examples: deployed undefined" in done.stderr
