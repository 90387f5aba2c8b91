"""`mdpd compare` for real: trainings in child processes, killed, continued, refused, read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mdpd_deploy import UserError, compare
from mdpd_deploy.cli import main
from mdpd_deploy.files import claimed

QUICK = dict(steps=3, batch=8, latency_seconds=0)


@pytest.fixture(scope="module")
def options(tiny_vit, digit_folder) -> dict:
    return dict(task="classify", data=digit_folder, backbone=tiny_vit, **QUICK)


@pytest.fixture(scope="module")
def done(tmp_path_factory, options) -> dict:
    """Two methods and a rival that does not fit, with a sweep, two seeds and latency."""
    return compare(
        methods=["probe", "unipt", "mdpd:unipt+side.reduction=7"],
        seeds=2,
        lr_factors=(1, 2),
        jobs=2,
        out=tmp_path_factory.mktemp("compare") / "study",
        **{**options, "latency_seconds": 0.2},
    )


def test_every_method_has_its_row(done):
    rows = {row["method"]: row for row in done["rows"]}
    assert set(rows) == {"probe", "side:unipt", "mdpd:unipt+side.reduction=7"}
    for name in ("probe", "side:unipt"):
        row = rows[name]
        assert row["seeds"] == [0, 1] and set(row["sweep"]) == {"1", "2"}
        assert 0 <= row["score"]["mean"] <= 1 and row["score"]["sd"] is not None
        assert row["peak_live_bytes"] > 0 and row["train_s"] >= 0
    assert rows["side:unipt"]["trained"] > rows["probe"]["trained"]


def test_a_rival_that_does_not_fit_is_a_row_with_the_reason(done):
    row = next(row for row in done["rows"] if row["method"].endswith("=7"))
    assert row["score"] is None
    assert len(row["failures"]) == 2 and "side.reduction=7 does not fit" in row["failures"][0]


def test_only_what_deploys_more_than_the_backbone_is_timed(done):
    assert done["latency"]["probe"]["ci95"] is None and done["latency"]["probe"]["ratio"] == 1
    low, high = done["latency"]["side:unipt"]["ci95"]
    assert low <= done["latency"]["side:unipt"]["ratio"] <= high


def test_the_folder_holds_a_page_a_table_and_every_run(done):
    folder = Path(done["folder"])
    assert "<svg" in (folder / "report.html").read_text()
    assert "| probe |" in (folder / "compare.md").read_text()
    stored = json.loads((folder / "compare.json").read_text())
    assert stored["rows"] == done["rows"]
    run = folder / "trials" / "classify" / "probe" / "lr×2-seed0" / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["train"]["seed"]) == (0.02, 0)
    for name in ("report.html", "compare.md", "compare.json"):
        assert str(folder.parents[1]) not in (folder / name).read_text()


def test_the_same_again_repeats_nothing_and_more_is_added(done, options):
    folder = Path(done["folder"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    again = compare(methods=["probe", "norms"], lr_factors=(1,), out=folder, **options)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1
    assert {row["method"] for row in again["rows"]} == {
        *(r["method"] for r in done["rows"]),
        "norms",
    }
    probe = next(row for row in again["rows"] if row["method"] == "probe")
    assert probe == next(row for row in done["rows"] if row["method"] == "probe")


def test_other_options_in_the_same_folder_are_refused(done, options):
    with pytest.raises(UserError, match=r"train\.steps=3, and this one has train\.steps=4"):
        compare(out=done["folder"], **{**options, "steps": 4})


@pytest.mark.parametrize(
    "words, said",
    [
        (dict(methods=["nope"]), "unknown 'nope'"),
        (dict(methods=["probe:unipt"]), "no side network"),
        (dict(methods=["probe+optim.nope=1"]), "unknown option 'optim.nope'"),
        (dict(seeds=0), "--seeds 0: give at least 1"),
        (dict(jobs=0), "--jobs 0: give at least 1"),
        (dict(lr_factors=(0,)), "--lr-factors"),
        (dict(engine="slurm"), "--engine: unknown 'slurm'"),
        (dict(method="probe"), "unknown 'method'"),
        (dict(set=["method=probe"]), "method=probe is no option of all methods"),
        (dict(methods=[]), "--methods names none"),
        (dict(methods=["probe+train.steps=9"]), "train.steps is the same for all methods"),
        (dict(methods=["probe+side.reduction=2"]), "does nothing with --method probe"),
        (dict(latency_seconds=-1), "--latency-seconds -1"),
        (dict(task="nope"), "--task: unknown 'nope'"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(tmp_path, options, words, said):
    with pytest.raises(UserError, match=said):
        compare(out=tmp_path / "study", **{**options, **words})
    assert not (tmp_path / "study" / "trials").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, options):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        compare(out=tmp_path, **options)


def test_two_comparisons_never_write_to_one_folder(tmp_path, options):
    folder = tmp_path / "study"
    with claimed(folder), pytest.raises(UserError, match="another comparison is writing"):
        compare(out=folder, **options)


def test_resume_takes_no_other_option(done, tmp_path):
    for words in (dict(steps=3), dict(seeds=1), dict(lr_factors=[1]), dict(methods=["probe"])):
        with pytest.raises(UserError, match="give no other option"):
            compare(resume=done["folder"], **words)
    with pytest.raises(UserError, match=r"no folder that `mdpd compare` wrote"):
        compare(resume=tmp_path)


@pytest.mark.slow
def test_killed_at_once_it_goes_on_and_repeats_no_finished_training(tmp_path, options):
    """The parent is killed while a training is at work; its child ends on its own and counts."""
    folder = tmp_path / "study"
    words = [sys.executable, "-m", "mdpd_deploy", "compare", "--methods", "probe,norms"]
    for name in ("task", "data", "backbone", "batch"):
        words += [f"--{name}", str(options[name])]
    words += ["--steps", "40", "--lr-factors", "1,2", "--latency-seconds", "0"]
    words += ["--out", str(folder)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr.readline().startswith("comparison: ")
        first = process.stderr.readline()
        assert first.startswith("[1/4] classify probe"), first
        deadline = time.monotonic() + 60
        while len(list(folder.rglob("run/config.yaml"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    assert 1 <= len(finished) < 4
    found = compare(resume=folder, latency_seconds=0)
    assert all(row["score"] for row in found["rows"]) and not found["rows"][0]["failures"]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(folder.rglob("summary.json"))) == 4


def test_the_command_prints_a_table_and_its_exit_code_tells_of_a_method_without_a_score(
    done, run_python
):
    """Every training is there already, so that this only reads."""
    ended = run_python("-m", "mdpd_deploy", "compare", "--resume", done["folder"],
                       "--latency-seconds", "0")  # fmt: skip
    assert ended.returncode == 1
    assert "probe" in ended.stdout and "report.html" in ended.stdout
    assert "failed: classify mdpd:unipt+side.reduction=7" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_a_forecast_needs_no_data_and_trains_nothing(tiny_vit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--forecast", "--backbone", str(tiny_vit), "--batch", "4", "--json"]
    assert main([*words, "--methods", "probe,mdpd:unipt+side.reduction=2,mdpd:unipt,prefix"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["probe"]["forecast"]["peak_bytes"] < rows["mdpd:unipt"]["forecast"]["peak_bytes"]
    assert rows["mdpd:unipt+side.reduction=2"]["forecast"] == rows["mdpd:unipt"]["forecast"]
    assert rows["prefix"]["forecast"] is None and "use --method prompt" in rows["prefix"]["reason"]
    assert not list(tmp_path.iterdir())
