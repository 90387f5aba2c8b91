"""`mdpd bench-latency` and its API on a real run directory and on real bundles."""

import json
import shutil

import pytest
import torch

from mdpd_deploy import bench_latency, build_engine, export_run, fit
from mdpd_deploy.cli import main
from mdpd_deploy.errors import UserError

pytestmark = pytest.mark.usefixtures("unwarmed")
FAST = {"batch": [1], "seconds": 0.05, "openings": 3, "threads": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("latency-cli")


@pytest.fixture(scope="module")
def run(root, tiny_vit):
    """The folder of a short run on the digits."""
    out = root / "runs" / "tiny"
    return fit(task="digits", backbone=tiny_vit, steps=2, batch=8, out=out, quiet=True).path


@pytest.fixture(scope="module")
def bundle(run):
    return export_run(run, metric_gate=False, golden="synthetic").path


def call(*words):
    return main(["bench-latency", *map(str, words)])


@pytest.mark.slow
def test_a_run_is_timed_in_both_runtimes(run, tiny_vit, capsys):
    options = ["--batch", "1", "--seconds", "0.05", "--openings", "3", "--threads", "1"]
    assert call(run, "--rivals", "bare,sherl", *options, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    folder = run / "latency"
    assert report.pop("folder") == str(folder)
    written = json.loads((folder / "latency.json").read_text())
    raw = written.pop("raw")
    assert written == report and len(raw) == len(report["rows"]) == 8
    assert report["identity"]["identical"] is True
    assert report["source"] == {
        "kind": "run",
        "name": "tiny",
        "task": "digits",
        "method": "mdpd",
        "side": "unipt",
        "backbone": tiny_vit.name,
    }
    assert report["settings"]["inputs"] == "validation examples of the run"
    untrained = {note["name"]: note["untrained"] for note in report["variants"]}
    assert untrained == {name: name == "sherl" for name in untrained}
    assert "timing onnx on cpu, batch 1" in printed.err
    assert {file.name for file in folder.iterdir()} == {
        "latency.json",
        "latency.png",
        "latency.svg",
    }


def test_a_bundle_in_its_run_is_timed_against_the_runs_side_networks(bundle, root):
    report = bench_latency(bundle, rivals=["unipt"], runtime=["onnx"], out=root / "named", **FAST)
    assert report["source"]["kind"] == "bundle of a run"
    assert report["settings"]["openings"] == 3 and "3 openings" in report["settings"]["statistic"]
    assert all(len(ratio["openings"]) == 3 for ratio in report["ratios"])
    assert [row["variant"] for row in report["rows"]][2:] == ["unipt"]
    assert not report["variants"][2]["untrained"]
    assert report["identity"] is None  # bare was not asked for
    assert (root / "named" / "latency.svg").is_file()


def test_a_bundle_alone_is_timed_against_bare(bundle, root, tiny_vit, capsys):
    alone = root / "elsewhere" / "model"
    shutil.copytree(bundle, alone)
    assert call(alone, "--batch", "1,2", "--seconds", "0.05", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "onnx on cpu, 1 thread, fp32" in out and "batch 2" in out
    assert "identity: the deployed graph and the bare backbone's are the same" in out
    assert f"report and chart: {alone}-latency" in out.replace("\n", "")
    again = bench_latency(alone, **FAST)  # the bundle is still sound, the first report still there
    assert again["folder"] == f"{alone}-latency-2"
    assert again["source"]["backbone"] == tiny_vit.name
    with pytest.raises(UserError, match="--rivals unipt: a bundle without its run"):
        bench_latency(alone, rivals=["bare", "unipt"], **FAST)
    with pytest.raises(UserError, match=r"--runtime torch: .* is a bundle without its run"):
        bench_latency(alone, runtime=["torch"], **FAST)


def test_an_engine_is_timed_against_rivals_built_alike(bundle, root, stand_in):
    with pytest.raises(UserError, match=r"--runtime trt: .* holds no TensorRT engine"):
        bench_latency(bundle, runtime=["trt"], **FAST)
    alone = root / "engine" / "model"
    shutil.copytree(bundle, alone)
    stand_in()
    build_engine(alone, static_batch=2)
    for options, words in (
        ({"batch": [1]}, "--batch 1: the engine takes 2 to 2 examples"),
        ({"device": "cpu"}, "--device cuda only"),
    ):
        with pytest.raises(UserError, match=words):
            bench_latency(alone, runtime=["trt"], **{**FAST, **options})
    report = bench_latency(alone, runtime=["trt"], **{**FAST, "batch": [2]})
    rows = {row["variant"]: row for row in report["rows"]}
    assert len(rows) == 3 and {row["runtime"] for row in rows.values()} == {"trt"}
    assert rows["bare"]["device"] == "cuda" and rows["bare"]["device_p50_ms"] == 0.25
    assert rows["bare"]["nodes"] == rows["deployed"]["nodes"] > 10


def test_a_bundle_of_another_run_is_refused(bundle, run, root):
    other = root / "runs" / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("bundles", "latency"))
    config = (other / "config.yaml").read_text().replace("seed: 0", "seed: 1")
    (other / "config.yaml").write_text(config)
    shutil.copytree(bundle, other / "bundles" / "onnx-fp32")
    with pytest.raises(UserError, match="was not exported from the run it lies in"):
        bench_latency(other / "bundles" / "onnx-fp32", **FAST)


def test_data_that_is_gone_is_replaced_by_random_inputs_and_said(run, root, capsys):
    moved = root / "runs" / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("bundles", "latency"))
    config = (moved / "config.yaml").read_text().replace("task: digits", "task: classify")
    (moved / "config.yaml").write_text(config)
    options = ["--runtime", "onnx", "--rivals", "bare", "--batch", "1", "--seconds", "0.05",
               "--openings", "3"]  # fmt: skip
    assert call(moved, *options) == 0
    assert "random inputs" in capsys.readouterr().err
    written = json.loads((moved / "latency" / "latency.json").read_text())
    assert written["settings"]["inputs"] == "random, shaped like real inputs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rivals", "unipt,nosuch"], "--rivals: unknown 'nosuch'"),
        (["--rivals", ""], "--rivals"),
        (["--runtime", "tflite"], "--runtime: unknown 'tflite'"),
        (["--runtime", "trt"], "tiny is a run, and engines belong to bundles"),
        (["--batch", "1,two"], "--batch 1,two: give whole numbers"),
        (["--batch", "0"], "--batch 0: a batch holds at least 1"),
        (["--seconds", "-1"], "--seconds -1.0: give a time above 0"),
        (["--seconds", "nan"], "--seconds nan: give a time above 0"),
        (["--openings", "0"], "--openings 0: give at least 3"),
        (["--openings", "2"], "--openings 2: give at least 3; fewer cannot say"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--seed", "-3"], "--seed -3"),
        (["--device", "tpu"], "--device: unknown 'tpu'"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_2(run, capsys, words, message):
    assert call(run, *words) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1


def test_bad_paths_are_one_sentence_and_exit_2(run, tmp_path, capsys):
    assert call(tmp_path / "nowhere") == 2
    assert "nowhere is not a run directory" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    assert call(run, "--out", tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_an_error(run, capsys):
    assert call(run, "--device", "cuda") == 2
    assert "--device cuda" in capsys.readouterr().err


def test_without_a_path_the_newest_run_is_taken_and_named(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    assert call("--threads", "0") == 2  # fails after the run was found and named
    assert "(the newest)" in capsys.readouterr().err


def test_a_report_is_never_written_into_a_bundle(bundle):
    with pytest.raises(UserError, match="lies in a bundle"):
        bench_latency(bundle, out=bundle / "latency", **FAST)
    assert not (bundle / "latency").exists()
