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
from PIL import Image

from mdpd_deploy import UserError, compare
from mdpd_deploy.artifacts.folders import claimed, is_claimed
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.cli import main
from mdpd_deploy.commands.study_facts import study_facts
from mdpd_deploy.commands.study_plan import asked_plan, method_labels, shared_config
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.load import load_task

BAD = "mdpd:unipt+side.reduction=7"


@pytest.fixture(scope="module")
def options(tiny_vit, digit_folder) -> dict:
    """Pictures without a validation split: some are held out."""
    data = digit_folder / "train"
    return dict(task="classify", data=data, backbone=tiny_vit, steps=3, batch=8, latency_seconds=0)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, options) -> dict:
    """One method with a sweep and two seeds."""
    folder = tmp_path_factory.mktemp("compare") / "study"
    return compare(methods=["probe"], seeds=2, lr_factors=(1, 2), jobs=2, out=folder, **options)


@pytest.fixture(scope="module")
def done(swept, options) -> dict:
    """A second method, and a rival that does not fit, added to it; with latency."""
    folder = Path(swept["folder"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    more = {**options, "latency_seconds": 0.2}
    added = compare(methods=["unipt", BAD], lr_factors=(1,), jobs=2, out=folder, **more)
    return {**added, "before": before}


def test_every_method_has_its_row(done):
    rows = {row["method"]: row for row in done["rows"]}
    assert set(rows) == {"probe", "side:unipt", BAD}
    assert list(rows["probe"]["scores"]) == ["0", "1"] and set(rows["probe"]["sweep"]) == {"1", "2"}
    assert rows["probe"]["score"]["sd"] is not None and rows["side:unipt"]["score"]["sd"] is None
    for name in ("probe", "side:unipt"):
        row = rows[name]
        assert 0 <= row["score"]["mean"] <= 1
        assert row["peak_live_bytes"] > 0 and row["train_s"] >= 0
    assert rows["side:unipt"]["trained"] > rows["probe"]["trained"]


def test_a_rival_that_does_not_fit_is_a_row_with_the_reason(done):
    row = next(row for row in done["rows"] if row["method"] == BAD)
    assert row["score"] is None
    assert len(row["failures"]) == 1 and "side.reduction=7 does not fit" in row["failures"][0]


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


def test_adding_repeats_nothing(swept, done):
    folder, before = Path(done["folder"]), done["before"]
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1
    probe = next(row for row in done["rows"] if row["method"] == "probe")
    assert probe == swept["rows"][0]


def test_every_seed_trains_and_measures_on_the_same_examples(done, options):
    folder = Path(done["folder"]) / "trials" / "classify"
    runs = [Run.open(path.parent) for path in folder.rglob("summary.json")]
    assert {run.config.train.seed for run in runs} == {0, 1}
    held_out = [list(run.load_task_data().evaluation["validation"].inputs) for run in runs]
    assert len(held_out) == 4 and all(found == held_out[0] for found in held_out)
    alone = DataConfig(path=str(options["data"]))  # as a run without a comparison has it
    other = load_task("classify", alone, seed=1).evaluation["validation"]
    assert list(other.inputs) != held_out[0]


def test_all_means_every_method_that_fits_the_backbone(tiny_vit):
    said: list[str] = []
    base = shared_config(None, [], {"backbone": tiny_vit})[0]
    labels = method_labels(base, ["all"], said.append)
    assert {"probe", "lora", "prompt", "mdpd:unipt"} <= set(labels)
    left_out = [line.partition(" is left out: ") for line in said]
    assert {name for name, _, _ in left_out} == {"prefix", "side:lst", "mdpd:lst"}  # width 32
    assert not {"prefix", "side:lst", "mdpd:lst"} & set(labels)
    assert all("use --method prompt" in why for name, _, why in left_out if name == "prefix")
    assert method_labels(base, ["prefix", "probe"], said.append) == ["prefix", "probe"]
    assert len(said) == 3


def test_what_a_suite_leaves_out_stands_in_the_report_without_places(tmp_path, tiny_vit):
    svhn = tmp_path / "data" / "svhn"
    svhn.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(svhn / "a.png")
    for file in ("train800.txt", "val200.txt"):
        (svhn / file).write_text("a.png 0\na.png 1\n")
    said: list[str] = []
    base = shared_config(None, [], {"backbone": tiny_vit, "data": tmp_path / "data"})[0]
    plan = asked_plan(tmp_path / "c", base, ["probe"], ["vtab"], 1, (1.0,), said.append)
    assert plan.tasks == ("vtab/svhn",) and len(said) == len(plan.left_out) == 18
    assert study_facts(plan, "local", 1, 1)["left_out"] == list(plan.left_out)
    assert str(tmp_path) in said[0] and str(tmp_path) not in plan.left_out[0]


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
def test_ended_or_killed_it_goes_on_and_repeats_no_finished_training(tmp_path, options):
    """SIGTERM ends the child too; after SIGKILL the child ends on its own, and counts."""
    folder = tmp_path / "study"
    words = [sys.executable, "-m", "mdpd_deploy", "compare", "--methods", "probe,norms"]
    for name in ("task", "data", "backbone", "batch"):
        words += [f"--{name}", str(options[name])]
    words += ["--steps", "100", "--lr-factors", "1", "--latency-seconds", "0"]
    words += ["--set", "train.eval_every=50", "--out", str(folder)]
    cut = folder / "trials" / "classify" / "norms" / "lr×1-seed0" / "run"
    log = cut / "metrics.jsonl"  # written anew when a training starts

    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr.readline().startswith("comparison: ")
        first = process.stderr.readline()
        assert first.startswith("[1/2] classify probe") and "(found)" not in first
        wait_for(log.exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert not is_claimed(cut) and not (cut / "summary.json").exists()
    (finished,) = folder.rglob("summary.json")
    times = finished.stat().st_mtime_ns, log.stat().st_mtime_ns

    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=os.environ) as process:
        wait_for(lambda: log.stat().st_mtime_ns != times[1], process)
        process.send_signal(signal.SIGKILL)
    found = compare(resume=folder, latency_seconds=0)
    assert all(row["score"] and not row["failures"] for row in found["rows"])
    assert finished.stat().st_mtime_ns == times[0]
    assert len(list(folder.rglob("summary.json"))) == 2


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_prints_a_table_and_its_exit_code_tells_of_a_method_without_a_score(
    done, monkeypatch, capsys
):
    """Every training is there already, so that this only reads."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", "--resume", done["folder"], "--latency-seconds", "0"]) == 1
    printed = capsys.readouterr()
    assert "probe" in printed.out and "report.html" in printed.out
    cells = [line.strip("|").split("|") for line in (Path(done["folder"]) / "compare.md")
             .read_text().splitlines() if line.startswith("| ") and "---" not in line]  # fmt: skip
    assert len(cells) >= 3
    for cell in (cell.strip() for line in cells for cell in line):
        assert cell in printed.out, f"{cell} is cut off in a narrow window"
    assert f"failed: classify {BAD}" in printed.out
    assert "(found)" in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize("option", [("--jobs", "2"), ("--engine", "ray"), ("--lr-factors", "1")])
def test_a_forecast_refuses_what_only_trainings_read(option, capsys):
    assert main(["compare", "--forecast", "--methods", "probe", *option]) == 2
    assert f"{option[0]} is of trainings, and --forecast runs none" in capsys.readouterr().err


def test_a_forecast_needs_no_data_and_trains_nothing(tiny_vit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--forecast", "--backbone", str(tiny_vit), "--batch", "4", "--json"]
    assert main([*words, "--methods", "probe,mdpd:unipt+side.reduction=2,mdpd:unipt,prefix"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["probe"]["forecast"]["peak_bytes"] < rows["mdpd:unipt"]["forecast"]["peak_bytes"]
    assert rows["mdpd:unipt+side.reduction=2"]["forecast"] == rows["mdpd:unipt"]["forecast"]
    assert rows["prefix"]["forecast"] is None and "use --method prompt" in rows["prefix"]["reason"]
    assert not list(tmp_path.iterdir())
