"""Several tasks on one backbone: one bundle, one graph, mixed batches, swap, and what is refused."""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mdpd_deploy import fit, load_bundle, verify_bundle
from mdpd_deploy.artifacts.manifest import graph_notes
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.artifacts.tasks import open_task
from mdpd_deploy.checks import mixed
from mdpd_deploy.checks.parity import FP32_TOLERANCE
from mdpd_deploy.checks.reference import torch_outputs
from mdpd_deploy.cli import main
from mdpd_deploy.commands.export import export_runs
from mdpd_deploy.errors import ExportError, UserError, VerificationError
from mdpd_deploy.export.multitask.bundle import share_tokenizer
from mdpd_deploy.export.tensorrt.swap import build_swap
from mdpd_deploy.graphs.deltas import HEAD_BIAS, HEAD_WEIGHT, Delta, load_delta
from mdpd_deploy.graphs.mixed import TABLE, added_nodes, mixed_graph
from mdpd_deploy.runtimes.base import first_columns, only
from mdpd_deploy.runtimes.mixed import Swap, TaskRunner, mixed_batch
from mdpd_deploy.runtimes.onnx import OnnxRunner

pytest.importorskip("onnxruntime", reason="runs exported graphs")

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz_bundle.py"
GATES = ("side_free", "identity", "parity", "swap", "metric", "golden", "mixed")
SHORT = {"steps": 6, "batch": 8, "quiet": True, "method": "norms"}


@pytest.fixture(scope="module")
def stars_run(tiny_bert, tmp_path_factory):
    """Three classes, from single texts of at most 12 tokens."""
    folder = tmp_path_factory.mktemp("stars")
    words = {"one": "awful", "two": "fine", "three": "great"}
    lines = [f"the film was {'very ' * (i % 3)}{word},{label}"
             for i in range(12) for label, word in words.items()]  # fmt: skip
    (folder / "all.csv").write_text("\n".join(["review,stars", *lines]))
    return fit(task="classify", data=folder / "all.csv", text="review", label="stars",
               backbone=tiny_bert, out=folder / "run", set=["data.max_length=12"],
               **SHORT).path  # fmt: skip


@pytest.fixture(scope="module")
def score_run(tiny_bert, tmp_path_factory):
    """Regression with large labels, from pairs of texts of at most 40 tokens."""
    folder = tmp_path_factory.mktemp("scores")
    rows = ["one,two,label"]
    rows += [
        f"a film {'good ' * i},the film was {'very ' * i}bad,{200 + 30 * i}" for i in range(9)
    ] * 4
    (folder / "all.csv").write_text("\n".join(rows))
    return fit(task="regress", data=folder / "all.csv", text=["one", "two"], backbone=tiny_bert,
               out=folder / "run", set=["data.max_length=40"], **SHORT).path  # fmt: skip


@pytest.fixture(scope="module")
def text_runs(tiny_text_run, stars_run, score_run):
    return [tiny_text_run.path, stars_run, score_run]


@pytest.fixture(scope="module")
def text_bundle(text_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("multi") / "text"
    return export_runs(text_runs, names=["mood", "stars", "score"], out=out)


@pytest.fixture(scope="module")
def image_runs(tiny_run, tiny_vit, digit_folder, tmp_path_factory):
    """Three classes by MDPD, and two of them by a probe, which leaves the norms alone."""
    folder = tmp_path_factory.mktemp("two-digits")
    for name in ("train/digit0", "train/digit1", "validation/digit0", "validation/digit1"):
        shutil.copytree(digit_folder / name, folder / "data" / name)
    options = {**SHORT, "method": "probe"}
    run = fit(
        task="classify", data=folder / "data", backbone=tiny_vit, out=folder / "run", **options
    )
    return [tiny_run.path, run.path]


@pytest.fixture(scope="module")
def image_bundle(image_runs, tmp_path_factory):
    """Prepared for TensorRT."""
    out = tmp_path_factory.mktemp("multi") / "image"
    words = ["--multi", "--fmt", "trt", "--golden", "synthetic", "--out", str(out)]
    assert main(["export", *map(str, image_runs), *words]) == 0
    return load_bundle(out)


@pytest.fixture
def damaged(text_bundle, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(text_bundle.path, tmp_path / "b")


RAWS = {
    "mood": ["the film was good", "a very very very slow and boring film was not great"],
    "stars": ["awful", "the film was very great", "fine"],
    "score": [("a film good", "the film was bad"), ("good " * 30, "very bad")],
}


def scaled_gap(found, reference):
    found, reference = only(found), only(reference)
    assert found.shape == reference.shape
    return np.abs(found - reference).max() / max(reference.std(), 1e-2 * np.abs(reference).max())


@pytest.mark.slow
def test_every_gate_passed_for_every_task(text_bundle, image_bundle):
    for bundle in (text_bundle, image_bundle):
        manifest = bundle.manifest
        assert manifest["kind"] == "multi" and manifest["faded"]
        assert {n: g["verdict"] for n, g in manifest["verification"].items()} == dict.fromkeys(
            GATES, "passed"
        )
        for entry in manifest["tasks"]:
            assert set(entry["verification"]) == set(GATES)
        parity = json.loads((bundle.path / "parity.json").read_text())
        assert list(parity) == [entry["name"] for entry in manifest["tasks"]]
    assert [t.name for t in image_bundle.tasks] == ["classify", "classify-2"]


def test_the_manifest_lists_tasks_in_the_order_of_task_id(text_bundle):
    mood, stars, score = text_bundle.tasks
    assert [
        (t.name, t.index, t.task.kind, t.width, len(t.fields) > 1) for t in text_bundle.tasks
    ] == [
        ("mood", 0, "classify", 2, False),
        ("stars", 1, "classify", 3, False),
        ("score", 2, "regress", 1, True),
    ]
    assert set(stars.task.labels) == {"one", "two", "three"} and score.task.labels == ()
    assert [t.preprocess.max_length for t in text_bundle.tasks] == [24, 12, 40]
    assert stars.facts["data"]["columns"] == ["review"] and mood.facts["method"] == "mdpd"
    manifest = text_bundle.manifest
    mixed, base = manifest["graphs"]
    assert [mixed["file"], base["file"]] == ["model.onnx", "base.onnx"]
    assert mixed["inputs"][-1] == {"name": "task_id", "dtype": "int64", "shape": ["batch"]}
    assert base["inputs"] == mixed["inputs"][:-1]
    assert mixed["outputs"] == [{"name": "outputs", "dtype": "float32", "shape": ["batch", 3]}]
    assert mixed["shapes"]["sequence"]["max"] == 40


def test_the_backbone_is_on_disk_once_and_a_task_is_small(text_bundle):
    path = text_bundle.path
    weights = (path / "model.onnx.data").stat().st_size
    assert (path / "model.onnx").stat().st_size + (path / "base.onnx").stat().st_size < 2 * weights
    for name in ("model.onnx", "base.onnx"):
        proto = onnx.load(path / name, load_external_data=False)
        outside = [t for t in proto.graph.initializer if t.external_data]
        assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {
            "model.onnx.data"
        }
    for task in text_bundle.tasks:
        tensors = load_file(path / "tasks" / task.name / "delta.safetensors")
        assert tensors[HEAD_WEIGHT].shape == (task.width, 32)
        assert sum(1 for name in tensors if "LayerNorm" in name) == len(tensors) - 2 > 0
        assert (path / "tasks" / task.name / "delta.safetensors").stat().st_size < 1_000_000
    tokenizers = [str(p.relative_to(path)) for p in path.rglob("tokenizer.json")]
    assert tokenizers == ["preprocessor/tokenizer.json"]


def test_mixed_and_swapped_outputs_are_each_single_models(text_bundle, text_runs):
    runner, swap = text_bundle.runner(), text_bundle.swap()
    assert set(swap) == {"mood", "stars", "score"}
    reference, arrays = {}, {}
    for task, path in zip(text_bundle.tasks, text_runs, strict=True):
        arrays = task.preprocess(RAWS[task.name])
        reference = torch_outputs(Run.open(path).load_deployed(), arrays)
        assert scaled_gap(TaskRunner(runner, task)(arrays), reference) < FP32_TOLERANCE
        assert scaled_gap(swap[task.name](arrays), reference) < FP32_TOLERANCE
        ids = np.full(len(RAWS[task.name]), task.index)
        padding = only(runner({**arrays, "task_id": ids}))[:, task.width :]
        assert not padding.any()
    assert only(reference).min() > 100  # scores are in the label's unit
    others = [swap[name](arrays) for name in ("mood", "stars")]  # tasks do differ
    assert scaled_gap(others[0], first_columns(others[1], 2)) > 0.01


def test_images_too_and_in_the_form_for_tensorrt(image_bundle, image_runs):
    assert image_bundle.manifest["mixed"]["added_nodes"]["Mul"] == 7
    graph = onnx.load(image_bundle.path / "model.onnx").graph
    ones = [tuple(t.dims) for t in graph.initializer if t.name.startswith("tasks.ones")]
    assert ones == [(32,)]
    rng = np.random.default_rng(0)
    raws = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(5)]
    runner, swap = image_bundle.runner(), image_bundle.swap()
    for task, path in zip(image_bundle.tasks, image_runs, strict=True):
        arrays = task.preprocess(raws)
        reference = torch_outputs(Run.open(path).load_deployed(), arrays)
        assert scaled_gap(TaskRunner(runner, task)(arrays), reference) < FP32_TOLERANCE
        assert scaled_gap(swap[task.name](arrays), reference) < FP32_TOLERANCE
    recipe = json.loads((image_bundle.path / "build_engine.json").read_text())
    assert recipe["profiles"][0]["task_id"] == {"min": [1], "opt": [8], "max": [32]}


def test_the_fused_form_adds_six_nodes_and_computes_the_same(image_bundle, tmp_path):
    base = onnx.load(image_bundle.path / "base.onnx", load_external_data=False)
    deltas = image_bundle.swap()
    rows = [
        load_delta(image_bundle.path / "tasks" / name / "delta.safetensors", deltas.base_sha256)
        for name in deltas
    ]
    fitted = [delta.fit(deltas.base.replaceable) for delta in rows]
    fused = mixed_graph(base, fitted, form="fused")
    assert added_nodes(base, fused) == {
        "Add": 1, "Gather": 1, "Gemm": -1, "MatMul": 1, "Reshape": 1, "Split": 1, "Squeeze": 1,
        "Unsqueeze": 1,
    }  # fmt: skip
    onnx.helper.set_model_props(fused, graph_notes(image_bundle.manifest))
    (tmp_path / "m.onnx").write_bytes(fused.SerializeToString())
    shutil.copy(image_bundle.path / "model.onnx.data", tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"pixel_values": rng.standard_normal((6, 3, 16, 16), dtype=np.float32),
              "task_id": np.array([1, 0, 0, 1, 1, 0])}  # fmt: skip
    gap = only(OnnxRunner(tmp_path / "m.onnx")(arrays)) - only(image_bundle.runner()(arrays))
    assert np.abs(gap).max() < 1e-5


def test_a_mixed_batch_answers_each_row_by_its_own_task(text_bundle):
    requests = [(name, raw) for name, raws in RAWS.items() for raw in raws]
    order = np.random.default_rng(1).permutation(len(requests))
    shuffled = [requests[place] for place in order]
    for batch in (32, 2):
        for (name, raw), found in zip(
            shuffled, text_bundle.run_mixed(shuffled, batch=batch), strict=True
        ):
            (alone,) = text_bundle.predict([raw], task=name)
            assert found.label == alone.label
            assert found.score is None or found.score == pytest.approx(alone.score, rel=1e-5)
            assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    assert text_bundle.run_mixed([]) == []


def test_openvino_runs_a_batch_of_several_tasks(text_bundle):
    """The graph's weights lie outside of its file, and reach it by what was read and hashed."""
    pytest.importorskip("openvino", reason="runs graphs")
    usual, other = text_bundle.runner(), text_bundle.runner(runtime="openvino")
    asked = [(text_bundle.task(name), raw) for name, raws in RAWS.items() for raw in raws]
    arrays = mixed_batch(asked)
    assert scaled_gap(other(arrays), usual(arrays)) < 1e-5
    for wrong in (arrays["task_id"][:1], arrays["task_id"] - 1):
        with pytest.raises(UserError, match="task_id"):
            other({**arrays, "task_id": wrong})
    assert not verify_bundle(text_bundle.path, runtime="openvino").unsound


def test_a_mixed_batch_truncates_by_task_and_pads_to_the_longest(text_bundle):
    mood, stars, score = text_bundle.tasks
    long = "film " * 60
    arrays = mixed_batch([(stars, long), (score, (long, long)), (mood, long), (stars, "fine")])
    assert arrays["task_id"].tolist() == [1, 2, 0, 1] and arrays["task_id"].dtype == np.int64
    assert arrays["attention_mask"].sum(axis=1).tolist() == [12, 40, 24, 3]
    assert (arrays["input_ids"][3, 3:] == stars.preprocess.pad_id).all()
    assert arrays["input_ids"].shape == (4, 40)


BAD_IDS = {
    "past the end": (np.array([0, 3]), "task_id 3 names no task"),
    "negative": (np.array([-1, 0]), "task_id -1 names no task"),
    "far": (np.array([2**62, 0]), "names no task"),
    "one for all": (np.array([1]), r"task_id is int64 \[1\], other inputs have 2 rows"),
    "a matrix": (np.zeros((2, 1), dtype=np.int64), r"task_id is int64 \[2, 1\]"),
    "float": (np.array([0.0, 1.0]), "task_id is float64"),
    "missing": (None, "task_id is missing"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_a_task_id_that_names_no_task_is_refused(name, text_bundle):
    ids, words = BAD_IDS[name]
    arrays = text_bundle.task("mood").preprocess(RAWS["mood"])
    if ids is not None:
        arrays["task_id"] = ids
    with pytest.raises(UserError, match=words) as refused:
        text_bundle.runner()(arrays)
    assert "0 (mood), 1 (stars), 2 (score)" in str(refused.value)


def test_predict_and_eval_by_task(text_bundle, sentence_folder, capsys):
    bundle = str(text_bundle.path)
    assert main(["predict", bundle, "--task", "stars", "--json", "the film was great"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["task"] == "stars" and said["predictions"][0]["label"] in ("one", "two", "three")
    data = str(sentence_folder / "validation.csv")
    assert main(["eval", bundle, "--task", "mood", "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["validation"]["deployed"]
    expected = json.loads((text_bundle.path / "parity.json").read_text())["mood"]["metric"]["onnx"]
    assert found == pytest.approx(expected)


def test_a_missing_or_unknown_task_names_the_valid_ones(text_bundle, capsys):
    bundle = str(text_bundle.path)
    for words in (["predict", bundle, "text"], ["eval", bundle, "--data", "x.csv"]):
        assert main(words) == 2
        assert "name one with --task mood|stars|score" in capsys.readouterr().err.replace("\n", " ")
    assert main(["predict", bundle, "text", "--task", "star"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--task: unknown 'star'. Did you mean 'stars'?" in said
    assert main(["predict", bundle, "text", "--task", "score"]) == 2
    assert "takes pairs of texts" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="task 'mood' takes single texts"):
        text_bundle.run_mixed([("mood", ("a", "b"))])
    with pytest.raises(UserError, match="name one with --task"):
        _ = text_bundle.preprocess


def test_no_torch_at_inference(text_bundle, run_python):
    code = f"""
import sys
from mdpd_deploy import load_bundle
bundle = load_bundle({str(text_bundle.path)!r})
bundle.run_mixed([("mood", "good film"), ("score", ("a", "b"))])
bundle.swap()["stars"](bundle.task("stars").preprocess(["fine"]))
assert "torch" not in sys.modules
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_tasks_with_another_tokenizer_keep_their_own(text_bundle, tmp_path):
    """As when the folder of a local backbone changed between two trainings."""
    sound = text_bundle.task("mood").preprocess
    other = json.loads(sound.tokenizer.to_str())
    other["normalizer"] = {"type": "Replace", "pattern": {"String": "great"}, "content": "awful"}
    changed = replace(sound, tokenizer=Tokenizer.from_str(json.dumps(other)))
    entries = [{**text_bundle.manifest["tasks"][0], "name": name} for name in ("a", "b", "c")]
    for entry, preprocess in zip(
        entries, (sound, replace(sound, max_length=7), changed), strict=True
    ):
        (tmp_path / "tasks" / entry["name"]).mkdir(parents=True)
        preprocess.save(tmp_path / "tasks" / entry["name"])
    share_tokenizer([tmp_path / "tasks" / name / "tokenizer.json" for name in "abc"], tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("tokenizer.json"))
    assert files == ["preprocessor/tokenizer.json", "tasks/c/tokenizer.json"]
    a, b, c = (open_task(tmp_path, index, entry) for index, entry in enumerate(entries))
    ids = [task.preprocess(["great"])["input_ids"].tolist() for task in (a, b, c)]
    assert ids[0] == ids[1] != ids[2] == a.preprocess(["awful"])["input_ids"].tolist()
    assert b.preprocess(["film " * 20])["input_ids"].shape == (1, 7)


@pytest.fixture(scope="module")
def bitfit_run(image_options, tmp_path_factory):
    out = tmp_path_factory.mktemp("bitfit") / "run"
    return fit(out=out, quiet=True, **{**image_options, "method": "bitfit", "steps": 2}).path


def refusals(image_runs, text_runs, bitfit, side):
    one, two = image_runs
    return {
        "several alone": ([one, two], "2 runs were given: add --multi"),
        "names alone": ([one, "--names", "a"], "--names belongs to --multi"),
        "no runs": (["--multi"], "--multi: name the runs"),
        "too few names": ([one, two, "--multi", "--names", "a"], "1 names for 2 runs"),
        "a path": ([one, two, "--multi", "--names", "a,../b"], "'../b' cannot name a task"),
        "equal names": ([one, two, "--multi", "--names", "a,a"], "'a' is given twice"),
        "eval data": ([one, two, "--multi", "--eval-data", "x"], "belongs to one run"),
        "side kept": ([one, side, "--multi"], f"{side} (method side) keeps a side network"),
        "biases": ([one, bitfit, "--multi"], f"{bitfit} (method bitfit) changed backbone."),
        "other backbone": ([one, text_runs[1], "--multi"], f"{text_runs[1]} has another backbone"),
        "precision": (
            [one, two, "--multi", "--precision", "fp16"],
            "belongs to a bundle of one task",
        ),
        "no run": ([one, "nowhere", "--multi"], "nowhere is not a run"),
    }


def test_runs_that_cannot_share_a_graph_are_named(
    image_runs, text_runs, bitfit_run, tiny_side_run, tmp_path, capsys
):
    out = tmp_path / "bundle"
    cases = refusals(image_runs, text_runs, bitfit_run, tiny_side_run.path)
    for name, (words, message) in cases.items():
        assert main(["export", *map(str, words), "--out", str(out)]) == 2, name
        said = " ".join(capsys.readouterr().err.split())
        assert re.sub(r"\s", "", message) in re.sub(r"\s", "", said), (name, said)
    resized = shutil.copytree(image_runs[1], tmp_path / "resized")
    file = resized / "model" / "preprocess.json"
    file.write_text(file.read_text().replace("16,\n    16", "24,\n    24"))
    with pytest.raises(UserError, match=r"resized has another image size .*\(24, 24\) instead of"):
        export_runs([image_runs[0], resized], out=out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_gate_names_the_task_it_failed_for(text_bundle, tmp_path):
    """A table whose rows are in another order than the tasks."""
    path = text_bundle.path
    sha = text_bundle.manifest["mixed"]["base_sha256"]
    rows = [
        load_delta(path / "tasks" / t.name / "delta.safetensors", sha) for t in text_bundle.tasks
    ]
    shapes = text_bundle.swap().base.replaceable
    base = onnx.load(path / "base.onnx", load_external_data=False)
    wrong = mixed_graph(base, [delta.fit(shapes) for delta in reversed(rows)])
    onnx.helper.set_model_props(wrong, graph_notes(text_bundle.manifest))
    (tmp_path / "wrong.onnx").write_bytes(wrong.SerializeToString())
    shutil.copy(path / "model.onnx.data", tmp_path)
    goldens = [text_bundle.golden(task) for task in text_bundle.tasks]

    def prove(runner):
        mixed.prove(text_bundle.tasks, goldens, [1.0] * 3, runner, FP32_TOLERANCE)

    with pytest.raises(VerificationError, match="mixed: in one batch with other tasks 'mood' is"):
        prove(OnnxRunner(tmp_path / "wrong.onnx"))
    prove(text_bundle.runner())


def test_a_mixed_graph_must_keep_every_node(text_bundle):
    base = onnx.load(text_bundle.path / "base.onnx", load_external_data=False)
    mixed = onnx.load(text_bundle.path / "model.onnx", load_external_data=False)
    assert sum(added_nodes(base, mixed).values()) == 6 + 2 * 6  # six norms
    softmax = next(node for node in mixed.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 1
    with pytest.raises(ExportError, match="lost Softmax"):
        added_nodes(base, mixed)


# --- deltas --------------------------------------------------------------------------------------


def change(path, **tensors):
    """Rewrite a delta with some tensors replaced, its notes kept."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as stream:
        notes = stream.metadata()
    save_file({**load_file(path), **tensors}, path, notes)


def test_a_delta_that_does_not_fit_is_one_clear_sentence(text_bundle, image_bundle, tmp_path):
    swap = text_bundle.swap()
    path = tmp_path / "delta.safetensors"
    sound = (text_bundle.path / "tasks" / "mood" / path.name).read_bytes()

    def refused(words, sha=swap.base_sha256):
        with pytest.raises(UserError, match=words) as error:
            swap.add("x", load_delta(path, sha))
        assert "\n" not in str(error.value)

    path.write_bytes(sound[:100])
    refused("cannot be read")
    path.write_bytes(b"\xff" * 64)
    refused("cannot be read")
    refused_missing = tmp_path / "none"
    with pytest.raises(UserError, match="cannot be read"):
        load_delta(refused_missing, "")
    save_file({"x": np.zeros(3, dtype=np.float32)}, path)
    refused("is not a task delta")
    path.write_bytes((image_bundle.path / "tasks" / "classify" / path.name).read_bytes())
    refused("belongs to another base graph")
    path.write_bytes(sound)
    change(path, **{HEAD_BIAS: np.array([np.nan, 0], dtype=np.float32)})
    refused("head.linear.bias is not finite float32")
    change(path, **{HEAD_BIAS: np.array(0, dtype=np.float32)})
    refused("has no head")
    path.write_bytes(sound)
    change(path, **{HEAD_WEIGHT: np.zeros((9, 32), dtype=np.float32)})
    refused("answers 9 outputs and the base graph has 3")
    change(path, **{HEAD_WEIGHT: np.zeros((2, 31), dtype=np.float32)})
    refused(r"head.linear.weight has shape \(2, 31\), not \(3, 32\)")
    path.write_bytes(sound)
    change(path, stranger=np.zeros(1, dtype=np.float32))
    refused("base graph has no place for stranger")
    tensors = load_file(text_bundle.path / "tasks" / "mood" / path.name)
    tensors.pop(next(name for name in tensors if "LayerNorm" in name))
    with pytest.raises(UserError, match="the delta lacks backbone"):
        swap.add("x", Delta(swap.base_sha256, tensors))
    with pytest.raises(UserError, match="'x' belongs to another base graph"):
        swap.add("x", Delta("0" * 64, tensors))


def test_one_engine_becomes_every_task_by_refitting(text_bundle, stand_in, tmp_path):
    stand_in()
    built = build_swap(text_bundle, tmp_path / "swap.plan")
    assert set(built) == {"mood", "stars", "score"} and built.in_place == "score"
    fed = text_bundle.swap()
    arrays = text_bundle.task("mood").preprocess(["a good film", "bad"])
    for name in ("mood", "stars", "mood", "score"):
        found, expected = only(built[name](arrays)), only(fed[name](arrays))
        assert built.in_place == name and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(KeyError):
        built["nosuch"]
    assert not [path for path in text_bundle.path.iterdir() if path.suffix == ".plan"]


def test_threads_that_ask_an_engine_for_different_tasks_take_turns(text_bundle, stand_in, tmp_path):
    stand_in()
    built, fed = build_swap(text_bundle, tmp_path / "swap.plan"), text_bundle.swap()
    arrays = text_bundle.task("mood").preprocess(["a good film", "bad"])
    names = ["mood", "stars", "score", "stars", "mood", "score"]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: built[name](arrays), names))
    for name, outputs in zip(names, found, strict=True):
        np.testing.assert_allclose(only(outputs), only(fed[name](arrays)), atol=1e-4)


def test_an_engine_stays_the_task_it_was_when_another_fails(text_bundle, stand_in, tmp_path):
    trt, _ = stand_in()
    built, fed = build_swap(text_bundle, tmp_path / "swap.plan"), text_bundle.swap()
    arrays = text_bundle.task("score").preprocess(["a good film"])
    trt._faults["forgotten"] = "head.linear.bias"
    with pytest.raises(VerificationError, match="refit: the outputs are off"):
        built["mood"](arrays)
    trt._faults.clear()
    assert built.in_place == "score"
    expected = only(fed["score"](arrays))
    np.testing.assert_allclose(only(built["score"](arrays)), expected, atol=1e-4)


def test_swapping_needs_several_tasks_and_a_sound_delta(
    text_bundle, tiny_bundle, stand_in, tmp_path
):
    with pytest.raises(UserError, match="has one task: there is nothing to swap"):
        build_swap(tiny_bundle, tmp_path / "swap.plan")
    trt, _ = stand_in()
    trt._faults["forgotten"] = "head.linear.bias"
    with pytest.raises(VerificationError, match="refit: the outputs are off"):
        build_swap(text_bundle, tmp_path / "swap.plan")


def test_swap_takes_a_delta_that_is_in_no_bundle(text_bundle):
    """A task that arrives later: the head doubled gives logits doubled."""
    base = text_bundle.manifest["mixed"]["base_sha256"]
    delta = load_delta(text_bundle.path / "tasks" / "mood" / "delta.safetensors", base)
    head = {name: 2 * delta.tensors[name] for name in (HEAD_WEIGHT, HEAD_BIAS)}
    swap = Swap(text_bundle.path / "base.onnx", {"mood": delta})
    twice = swap.add("twice", Delta(base, {**delta.tensors, **head}))
    arrays = text_bundle.task("mood").preprocess(RAWS["mood"])
    np.testing.assert_allclose(only(twice(arrays)), 2 * only(swap["mood"](arrays)), rtol=1e-5)


# --- the bundle ----------------------------------------------------------------------------------


def test_a_bundle_of_tasks_of_the_first_schema_opens(text_bundle, tmp_path):
    folder = shutil.copytree(text_bundle.path, tmp_path / "b")
    plain = json.loads((folder / "manifest.json").read_text())
    model, base = plain.pop("graphs")
    del plain["pipeline"]
    plain |= {name: model[name] for name in ("inputs", "outputs", "shapes", "opset", "nodes")}
    plain["mixed"]["base_nodes"] = base["nodes"]
    for told in (plain, *plain["tasks"]):
        told["pair"] = len(told.pop("fields")) > 1
    plain["modality"] = "text"
    (folder / "manifest.json").write_text(json.dumps(plain | {"schema": "1.1"}))
    earlier = load_bundle(folder)
    assert earlier.manifest["graphs"] == text_bundle.manifest["graphs"]
    assert verify_bundle(folder).unsound == []
    asked = [("mood", "a good film"), ("stars", "bad")]
    assert earlier.run_mixed(asked) == text_bundle.run_mixed(asked)
    plain["mixed"] = 3
    (folder / "manifest.json").write_text(json.dumps(plain | {"schema": "1.1"}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_bundle(folder)


def rewrite(bundle, change):
    plain = json.loads((bundle / "manifest.json").read_text())
    change(plain)
    (bundle / "manifest.json").write_text(json.dumps(plain))


def relist(bundle, name):
    """Bring the manifest up to date, as someone who tampers would."""
    raw = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    rewrite(bundle, lambda plain: plain["files"].update({name: entry}))


def foreign_delta(bundle, image_bundle):
    name = "tasks/mood/delta.safetensors"
    shutil.copy(image_bundle.path / "tasks/classify/delta.safetensors", bundle / name)
    relist(bundle, name)


def exchanged_deltas(bundle, _):
    name, other = (f"tasks/{task}/delta.safetensors" for task in ("mood", "stars"))
    shutil.copy(bundle / other, bundle / name)
    relist(bundle, name)


def other_weights(bundle, _):
    data = bundle / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\1")
    relist(bundle, "model.onnx.data")


def other_length(bundle, _):
    file = bundle / "tasks/stars/preprocess.json"
    file.write_text(file.read_text().replace("12", "13"))
    relist(bundle, "tasks/stars/preprocess.json")


DAMAGE = {
    "flipped byte": (
        lambda b, _: (b / "tasks/mood/delta.safetensors").write_bytes(b"x"),
        "tasks/mood/delta.safetensors is not the file that was exported",
    ),
    "missing delta": (
        lambda b, _: (b / "tasks/mood/delta.safetensors").unlink(),
        "tasks/mood/delta.safetensors is missing",
    ),
    "delta of another base": (foreign_delta, "belongs to another base graph"),
    "deltas exchanged": (exchanged_deltas, "'mood' answers 3 outputs and manifest.json lists 2"),
    "other weights": (other_weights, "the notes inside base.onnx contradict manifest.json"),
    "other preprocessing": (other_length, "tasks/stars/ contradicts manifest.json"),
    "a name that leaves": (
        lambda b, _: rewrite(b, lambda p: p["tasks"][0].update(name="../../x")),
        "manifest.json is damaged at 'tasks.0.name'",
    ),
    "no verdicts": (
        lambda b, _: rewrite(b, lambda p: p["tasks"][1].pop("verification")),
        "manifest.json is damaged at 'tasks.1.verification'",
    ),
    "a name twice": (
        lambda b, _: rewrite(b, lambda p: p["tasks"][0].update(name="stars")),
        "two tasks have one name",
    ),
    "no tasks": (
        lambda b, _: rewrite(b, lambda p: p.update(tasks=[])),
        "neither one task with metrics, nor several",
    ),
    "tasks in another order": (
        lambda b, _: rewrite(b, lambda p: p["tasks"].reverse()),
        "the notes inside model.onnx contradict manifest.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_in_one_sentence(name, damaged, image_bundle):
    damage, words = DAMAGE[name]
    damage(damaged, image_bundle)
    with pytest.raises(UserError) as refused:
        load_bundle(damaged)
    message = str(refused.value)
    assert words in message and str(damaged) in message and "\n" not in message


def test_what_belongs_to_one_task_is_refused(text_bundle, tiny_run, image_bundle, tmp_path, capsys):
    assert main(["bench-latency", str(text_bundle.path), "--out", str(tmp_path / "b")]) == 2
    assert "answers several tasks" in " ".join(capsys.readouterr().err.split())
    assert main(["eval", str(tiny_run.path), "--task", "x"]) == 2
    assert "a run has one" in " ".join(capsys.readouterr().err.split())


# --- verify ---------------------------------------------------------------------------------------


def test_a_bundle_of_several_tasks_is_verified_from_what_it_holds(text_bundle, image_bundle):
    for bundle, names in ((text_bundle, ("mood", "stars", "score")), (image_bundle, ())):
        report = verify_bundle(bundle.path)
        assert report.unsound == []
        verdicts = {check.name: check.verdict for check in report.checks}
        assert verdicts["identity"] == verdicts["side_free"] == verdicts["parameters"] == "passed"
        assert all(verdicts[f"golden of {name}"] == "passed" for name in names)


def test_a_delta_that_the_graph_does_not_hold_is_found(damaged):
    path = damaged / "tasks" / "mood" / "delta.safetensors"
    delta = load_delta(
        path, json.loads((damaged / "manifest.json").read_text())["mixed"]["base_sha256"]
    )
    delta.tensors[HEAD_BIAS][0] += 1
    delta.save(path)
    relist(damaged, "tasks/mood/delta.safetensors")
    report = verify_bundle(damaged)
    assert report.unsound[0] == "identity"
    assert "deltas" in {check.name: check.note for check in report.checks}["identity"]


def drop_table(graph):
    graph.initializer.remove(table_of(graph))


def repeat_table(graph):
    graph.initializer.add().CopyFrom(table_of(graph))


def flatten_table(graph):
    del table_of(graph).dims[:]


def table_of(graph):
    return next(tensor for tensor in graph.initializer if tensor.name == TABLE)


def drop_weight(graph):
    graph.initializer.remove(next(t for t in graph.initializer if "word_embeddings" in t.name))


def shape_weight(graph):
    next(t for t in graph.initializer if t.name == HEAD_BIAS).dims.append(2**40)


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("model.onnx", drop_table, "parameters"),
        ("model.onnx", repeat_table, "parameters"),
        ("model.onnx", flatten_table, "parameters"),
        ("base.onnx", drop_weight, "identity"),
        ("base.onnx", shape_weight, "identity"),
        ("base.onnx", lambda graph: graph.initializer.pop(), "identity"),
        ("base.onnx", lambda graph: graph.node.pop(), "identity"),
    ],
)
def test_a_damaged_graph_of_several_tasks_fails_its_checks(name, change, check, damaged):
    """Hashes and the deltas' notes agree with the damage, so only the checks can see it."""
    proto = onnx.load(damaged / name, load_external_data=False)
    change(proto.graph)
    (damaged / name).write_bytes(proto.SerializeToString())
    relist(damaged, name)
    if name == "base.onnx":
        digest = hashlib.sha256((damaged / name).read_bytes()).hexdigest()
        for path in damaged.glob("tasks/*/delta.safetensors"):
            tensors = load_file(path)
            Delta(digest, tensors).save(path)
            relist(damaged, str(path.relative_to(damaged)))
    found = {seen.name: seen for seen in verify_bundle(damaged).checks}
    assert found[check].verdict == "failed" and "\n" not in found[check].note
    assert all(found[f"golden of {task}"].verdict == "not run" for task in RAWS)


def test_a_weight_of_the_mixed_graph_that_the_golden_vectors_miss_is_seen(damaged):
    proto = onnx.load(damaged / "model.onnx", load_external_data=False)
    table = table_of(proto.graph)
    values = numpy_helper.to_array(table) * np.float32(1 + 1e-6)
    table.CopyFrom(numpy_helper.from_array(values, TABLE))
    (damaged / "model.onnx").write_bytes(proto.SerializeToString())
    relist(damaged, "model.onnx")
    assert {"graph", "identity"} <= set(verify_bundle(damaged).unsound)


def test_fuzzed_bundles_of_several_tasks_are_only_ever_refused_or_fail_checks(
    text_bundle, run_python, tmp_path
):
    """The same program makes 1,500 examples for docs/reliability.md."""
    out = tmp_path / "fuzz.json"
    done = run_python(str(FUZZ), str(text_bundle.path), "--examples", "100", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(out.read_text())["outcomes"]
    assert {"refused", "checks failed"} <= {what.split(": ")[1] for what in outcomes}


def test_verify_of_several_tasks_takes_no_data_of_one(text_bundle):
    with pytest.raises(UserError, match="mdpd eval"):
        verify_bundle(text_bundle.path, eval_data="x.csv")
