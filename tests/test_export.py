"""Export end to end: real runs of tiny models, the command line, the gates, and what is left behind."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mdpd_deploy import export_run, fit, load_bundle
from mdpd_deploy.checks import parity
from mdpd_deploy.checks.policy import agreement
from mdpd_deploy.checks.reference import Reference, torch_outputs
from mdpd_deploy.cli import main
from mdpd_deploy.data.preprocess import ImagePreprocess, TextPreprocess
from mdpd_deploy.errors import ExportError, UserError, VerificationError
from mdpd_deploy.export.fade import Faded, fade, prove_identity, prove_side_free
from mdpd_deploy.export.golden import make_golden, synthetic_inputs
from mdpd_deploy.export.tensorrt.profiles import profile_shapes
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.train.methods import METHODS
from mdpd_deploy.train.methods.direct import Direct

pytest.importorskip("onnxruntime", reason="runs exported graphs")

WORDS = ["good", "bad", "film", "a", "the", "very"]
COLOURS = {"blue": (20, 20, 220), "green": (20, 220, 20), "red": (220, 20, 20)}
SHORT = {"steps": 4, "batch": 4, "quiet": True}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 5)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(-20, 20, (20, 26, 3)) + np.array(colour)
                picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
                picture.save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def image_run(images, tiny_vit, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "image"
    return fit(task="classify", data=images, backbone=str(tiny_vit), out=out, **SHORT)


@pytest.fixture(scope="session")
def pair_table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "pairs.csv"
    rng = np.random.default_rng(0)
    rows = ["one,two,label"]
    for _ in range(40):
        first, second = (" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(2))
        rows.append(f"{first},{second},{'same' if 'good' in first else 'other'}")
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="session")
def pair_run(pair_table, tiny_bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pair"
    return fit(
        task="classify",
        data=pair_table,
        text=["one", "two"],
        backbone=str(tiny_bert),
        out=out,
        set=["data.max_length=20", "side.reduction=4"],
        **SHORT,
    )


@pytest.fixture(scope="session")
def side_run(tiny_bert, tmp_path_factory):
    """`--method side`, which keeps its side network, on regression."""
    folder = tmp_path_factory.mktemp("scores")
    lines = [
        json.dumps({"text": "very " * i + "good film", "label": 20.0 + 3 * i}) for i in range(9)
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return fit(
        task="regress",
        data=folder,
        backbone=str(tiny_bert),
        method="side",
        side="sherl",
        out=folder / "run",
        set=["data.max_length=20", "side.reduction=4"],
        **SHORT,
    )


@pytest.fixture(scope="session")
def image_bundle(image_run):
    return export_run(image_run.path)


@pytest.fixture(scope="session")
def rival_graph(image_run, tmp_path_factory):
    """The same run with its side network kept: what an export must never be."""
    rival = image_run.load_with_side()[0]
    return export_onnx(rival, tmp_path_factory.mktemp("rival") / "rival.onnx")


@pytest.fixture(scope="session")
def pair_bundle(pair_run):
    return export_run(pair_run.path, fmt="trt")


@pytest.fixture(scope="session")
def side_bundle(side_run):
    return export_run(side_run.path)


def verdicts(bundle):
    return {name: gate["verdict"] for name, gate in bundle.manifest["verification"].items()}


def test_every_gate_passed_and_the_manifest_says_so(image_bundle, image_run):
    assert image_bundle.path == image_run.path / "bundles" / "onnx-fp32"
    assert verdicts(image_bundle) == dict.fromkeys(
        ("side_free", "identity", "parity", "metric", "golden"), "passed"
    )
    manifest = image_bundle.manifest
    assert manifest["faded"] and manifest["method"] == "mdpd"
    assert manifest["labels"] == ["blue", "green", "red"]
    assert manifest["source"]["run"] == "image"
    assert manifest["graphs"][0]["inputs"][0]["shape"] == ["batch", 3, 16, 16]
    details = json.loads((image_bundle.path / "parity.json").read_text())
    assert details["parity"]["scaled_diff"] < details["parity"]["tolerance"] == 1e-4
    assert details["metric"]["onnx"] == details["metric"]["torch"] == details["metric"]["reported"]
    norms = {f"backbone.{name}" for name in image_run.load_bare().backbone.norms()}
    assert set(details["identity"]["changed_weights"]) <= norms


def test_the_graph_is_smaller_than_its_rival(image_bundle, rival_graph):
    assert image_bundle.graph()["nodes"] < rival_graph.nodes
    names = {t.name for t in onnx.load(image_bundle.path / "model.onnx").graph.initializer}
    assert not any(name.startswith("side") for name in names)


def test_nothing_in_the_bundle_names_the_training_machine(pair_bundle, pair_run, tiny_bert):
    for path in pair_bundle.path.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            for place in (tiny_bert, pair_run.path.parent, Path.home(), sys.prefix):
                assert str(place).encode() not in raw, (path.name, place)
            assert path.stat().st_mode & 0o044, f"{path.name} can be read by its owner only"


def test_the_graph_alone_still_says_what_it_is(image_bundle):
    notes = image_bundle.runner().metadata
    assert json.loads(notes["mdpd.labels"]) == ["blue", "green", "red"]
    assert json.loads(notes["mdpd.preprocess"]) == image_bundle.manifest["preprocess"]


def test_bare_norms_are_the_untouched_ones(image_bundle, image_run):
    kept = load_file(image_bundle.path / "bare_norms.safetensors")
    bare = image_run.load_bare().state_dict()
    assert kept and all(np.array_equal(kept[name], bare[name].numpy()) for name in kept)


def test_pairs_get_two_axes_a_tokenizer_and_a_recipe(pair_bundle):
    manifest = pair_bundle.manifest
    assert manifest["fields"] == ["text", "text"] and manifest["data"]["columns"] == ["one", "two"]
    assert manifest["graphs"][0]["shapes"]["sequence"] == {"min": 1, "opt": 20, "max": 20}
    assert (pair_bundle.path / "preprocessor" / "tokenizer.json").is_file()
    assert manifest["engine"]["status"] == "to-build" and manifest["engine"]["reason"]
    recipe = json.loads((pair_bundle.path / "build_engine.json").read_text())
    inputs = [port["name"] for port in manifest["graphs"][0]["inputs"]]
    assert recipe["profiles"][0] == {
        name: {"min": [1, 1], "opt": [8, 20], "max": [32, 20]} for name in inputs
    }
    script = pair_bundle.path / "build_engine.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert f"--maxShapes={','.join(f'{name}:32x20' for name in inputs)}" in script.read_text()


def test_the_recipe_calls_trtexec_from_anywhere(pair_bundle, tmp_path):
    tool = tmp_path / "trtexec"
    tool.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    tool.chmod(0o755)
    words = subprocess.run(
        ["sh", str(pair_bundle.path / "build_engine.sh"), str(tmp_path / "my plan")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[0] == f"--onnx={pair_bundle.path.resolve()}/model.onnx"
    assert words[1] == f"--saveEngine={tmp_path}/my plan"
    assert [word.partition("=")[0] for word in words[2:]] == [
        "--skipInference", "--minShapes", "--optShapes", "--maxShapes", "--builderOptimizationLevel",
    ]  # fmt: skip
    load_bundle(pair_bundle.path)


def test_profiles_follow_the_one_shape_spec():
    inputs = [{"name": "x", "shape": ["batch", 3, 8, 8]}]
    shapes = {"batch": {"min": 1, "opt": 2, "max": 4}}
    expected = {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [4, 3, 8, 8]}
    assert profile_shapes({"inputs": inputs, "shapes": shapes}) == {"x": expected}


def test_method_side_deploys_its_side_network(side_bundle, side_run):
    assert not side_bundle.manifest["faded"]
    assert verdicts(side_bundle) == {
        "side_free": "not applicable",
        "identity": "not applicable",
        "parity": "passed",
        "metric": "passed",
        "golden": "passed",
    }
    assert not (side_bundle.path / "bare_norms.safetensors").exists()
    (prediction,) = side_bundle.predict(["very very good film"])
    with torch.no_grad():
        arrays = side_bundle.preprocess(["very very good film"])
        model = side_run.load_deployed()
        expected = model(*(torch.from_numpy(arrays[n]) for n in model.backbone.input_names))
    assert prediction.score == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("method", "kind"), [("prompt", "image"), ("prefix", "pair")])
def test_virtual_tokens_are_deployed_too(
    method, kind, images, pair_table, tiny_vit, tiny_bert, tmp_path
):
    data = {
        "image": dict(data=images, backbone=tiny_vit),
        "pair": dict(
            data=pair_table, text=["one", "two"], backbone=tiny_bert, set=["data.max_length=20"]
        ),
    }[kind]
    run = fit(task="classify", method=method, out=tmp_path / "run", **data, **SHORT)
    bundle = export_run(run.path)
    assert not bundle.manifest["faded"]
    expected = {"side_free": "not applicable", "identity": "not applicable"}
    assert verdicts(bundle) == expected | dict.fromkeys(("parity", "metric", "golden"), "passed")
    assert not (bundle.path / "bare_norms.safetensors").exists()


def test_a_metric_that_training_did_not_report_stops_the_export(image_run, tmp_path):
    changed = copy_run(image_run, tmp_path / "run")
    summary = json.loads((changed / "summary.json").read_text())
    summary["metrics"]["deployed"]["accuracy"] += 0.2
    (changed / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(VerificationError, match=r"metric: accuracy is .* by PyTorch and"):
        export_run(changed)
    assert not (changed / "bundles").exists() or not list((changed / "bundles").iterdir())


def copy_run(run, target):
    import shutil

    ignore = shutil.ignore_patterns("bundles", "checkpoints")
    return shutil.copytree(run.path, target, ignore=ignore)


def test_data_that_is_gone_is_named_with_the_mends(image_run, images, tmp_path):
    changed = copy_run(image_run, tmp_path / "run")
    config = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(config.replace(str(images), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"gone.*--eval-data.*--no-metric-gate"):
        export_run(changed, out=tmp_path / "a")
    moved = export_run(changed, out=tmp_path / "b", eval_data=str(images / "validation"))
    assert verdicts(moved)["metric"] == "passed"
    private = export_run(changed, out=tmp_path / "c", metric_gate=False, golden="synthetic")
    assert verdicts(private)["metric"] == "skipped"
    assert private.manifest["verification"]["metric"]["note"] == "--no-metric-gate was given"
    assert not (tmp_path / "a").exists()


def test_side_free_gate_sees_a_side_network_by_type_name_and_size(
    image_run, image_bundle, rival_graph, tmp_path
):
    faded = fade(image_run)
    rival = image_run.load_with_side()[0]
    with pytest.raises(VerificationError, match="belongs to the side network"):
        prove_side_free(faded, rival_graph)
    own = replace(rival_graph, path=image_bundle.path / "model.onnx")
    assert prove_side_free(faded, own).verdict == "passed"
    with pytest.raises(VerificationError, match="belongs to the side network"):
        prove_side_free(Faded(rival, faded.bare, ()), own)
    proto = onnx.load(rival_graph.path)
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace("side", "part")
    onnx.save(proto, tmp_path / "renamed.onnx")
    with pytest.raises(VerificationError, match="backbone and head only"):
        prove_side_free(faded, replace(rival_graph, path=tmp_path / "renamed.onnx"))


def test_identity_gate_refuses_another_structure(image_run, rival_graph):
    with pytest.raises(VerificationError, match="identity: the graph is not the backbone's"):
        prove_identity(fade(image_run), rival_graph)


def test_identity_gate_refuses_a_frozen_weight_that_moved(image_run, tmp_path):
    faded = fade(image_run)
    with torch.no_grad():
        faded.model.backbone.get_parameter(frozen_bias(faded.model.backbone)).add_(0.5)
    moved = export_onnx(faded.model, tmp_path / "moved.onnx")
    with pytest.raises(VerificationError, match="differs from the backbone's untuned weight"):
        prove_identity(faded, moved)


def frozen_bias(backbone):
    norms = set(backbone.norms())
    biases = (n for n, p in backbone.named_parameters() if n.endswith("bias") and n not in norms)
    return next(name for name in biases if "fc1" in name)


def test_parity_gate_refuses_other_numbers(image_run, image_bundle):
    model, runner = fade(image_run).model, image_bundle.runner()
    golden = make_golden(model, image_run.preprocess, (), ("image",))
    reference = Reference(model, image_run.preprocess, golden)
    gate, compared = parity.prove(reference, runner)
    assert gate.verdict == "passed"
    assert [case.name for case in compared.cases][-1] == "golden inputs" and len(
        compared.cases
    ) == 4
    with torch.no_grad():
        model.head.linear.bias.add_(0.01)
    with pytest.raises(VerificationError, match=r"parity: outputs differ .* allowed 1e-04"):
        parity.prove(reference, runner)


def test_predictions_may_flip_only_within_the_drift():
    def flips(reference, outputs, drift):
        kept = agreement(reference, outputs, drift)
        return kept.rows - kept.same

    reference = np.array([[1.0, 1.0005], [0.0, 2.0], [3.0, 0.0]], dtype=np.float32)
    near = np.array([[1.0005, 1.0], [0.0, 2.0], [3.0, 0.0]], dtype=np.float32)
    far = np.array([[1.0, 1.0005], [2.0, 0.0], [3.0, 0.0]], dtype=np.float32)
    assert flips(reference, near, 1e-3) == 0
    assert flips(reference, near, 1e-4) == 1
    assert flips(reference, far, 1e-3) == 1
    scores = np.array([[1.0], [2.0]], dtype=np.float32)
    assert flips(scores, scores + np.float32(0.01), 1e-3) == 2


def test_synthetic_inputs_fit_every_preprocessing(image_run, pair_run):
    assert isinstance(image_run.preprocess, ImagePreprocess)
    assert isinstance(pair_run.preprocess, TextPreprocess)
    assert image_run.preprocess(synthetic_inputs(image_run.preprocess, ("image",)))
    pairs = synthetic_inputs(pair_run.preprocess, ("text", "text"))
    assert all(isinstance(pair, tuple) for pair in pairs) and pair_run.preprocess(pairs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "one int8 file cannot serve all"),
        ({"fmt": "tensorflow"}, "--fmt: unknown 'tensorflow'"),
        ({"golden": "none"}, "--golden: unknown 'none'"),
        ({"require_engine": True}, "belongs to --fmt trt"),
        ({"tf32": False}, "--tf32 belongs to --fmt trt"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words, image_run):
    with pytest.raises(UserError, match=words):
        export_run(image_run.path, **options)


def test_a_required_engine_that_cannot_be_built_is_a_failure(image_run, tmp_path):
    with pytest.raises(
        ExportError, match=r"--require-engine: no TensorRT engine.*build_engine\.sh"
    ):
        export_run(image_run.path, fmt="trt", require_engine=True, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_full_folder_is_kept_without_overwrite(image_bundle, image_run):
    before = (image_bundle.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        export_run(image_run.path)
    assert (image_bundle.path / "manifest.json").read_bytes() == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        export_run(tmp_path)


# --- the commands, as a user types them ----------------------------------------------------------


def test_export_with_json_and_a_word_about_tensorrt(image_run, tmp_path, capsys):
    out = tmp_path / "b"
    words = ["export", image_run.path, "--fmt", "trt", "--out", out, "--json"]
    assert main([*map(str, words), "--golden", "synthetic"]) == 0
    said = capsys.readouterr()
    plain = json.loads(said.out)
    assert plain["engine"]["status"] == "to-build" and plain["golden"] == "synthetic"
    assert said.err.count("no TensorRT engine was built") == 1
    assert load_bundle(out).manifest["schema"] == plain["schema"]


def test_the_newest_run_is_taken_and_named(image_run, tmp_path, monkeypatch, capsys, caplog):
    copy_run(image_run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    assert main(["export"]) == 0
    assert "run: runs/mine (the newest)" in caplog.text
    shown = capsys.readouterr().out
    assert "bundle: runs/mine/bundles/onnx-fp32" in shown and "identity" in shown
    assert "golden.safetensors holds validation inputs" in shown


NO_TORCH = """
import sys
from mdpd_deploy.cli import main
code = main(sys.argv[1:])
loaded = [name for name in ("torch", "transformers", "timm", "accelerate") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else code)
"""


def torch_free(*words):
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_predict_and_eval_of_a_bundle_import_no_torch(image_bundle, images):
    picture = images / "validation" / "red" / "0.png"
    done = torch_free("predict", image_bundle.path, picture, picture, "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    assert plain["provider"] == "CPUExecutionProvider"
    (expected,) = image_bundle.predict([picture])
    for row in plain["predictions"]:
        assert row["input"] == str(picture) and row["label"] == expected.label
        assert row["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert len(row["top"]) == 2
    done = torch_free("eval", image_bundle.path, "--data", images / "validation", "--json")
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    details = json.loads((image_bundle.path / "parity.json").read_text())
    assert plain["metrics"]["validation"]["deployed"] == details["metric"]["onnx"]
    assert plain["examples"] == {"validation": 15} and plain["runtime"] == "onnx"


def test_eval_of_a_run_measures_deployed_and_side(image_run, capsys):
    assert main(["eval", str(image_run.path), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["metrics"]["validation"] == {
        "deployed": image_run.summary["metrics"]["deployed"],
        "side": image_run.summary["metrics"]["side"],
    }


def test_eval_of_a_bundle_on_a_table(pair_bundle, pair_table, capsys):
    assert main(["eval", str(pair_bundle.path), "--data", str(pair_table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == {"validation": 40}
    assert main(["eval", str(pair_bundle.path), "--data", str(pair_table)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["eval", str(pair_bundle.path)]) == 2
    assert "add --data" in capsys.readouterr().err


def test_predict_on_a_table_of_pairs(pair_bundle, tmp_path, capsys):
    table = tmp_path / "new.jsonl"
    rows = [{"one": "a good film", "two": "very bad"}, {"one": "the film", "two": "[film]"}]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert main(["predict", str(pair_bundle.path), str(table)]) == 0
    shown = capsys.readouterr().out
    assert "a good film | very bad" in shown and "the film | [film]" in shown
    assert main(["predict", str(pair_bundle.path), "a lone text"]) == 2
    assert "pairs of texts" in capsys.readouterr().err


def test_predict_on_a_literal_text_gives_a_score(side_bundle, capsys):
    assert main(["predict", str(side_bundle.path), "good film", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    assert row == {"input": "good film", "score": pytest.approx(row["score"])}
    assert 10 < row["score"] < 60, "scores are in the label's unit"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.png"], "missing.png cannot be opened"),
        (["missing.csv"], "missing.csv"),
        (["{truncated}"], "damaged or truncated"),
        (["{picture}", "--device", "tpu"], "--device tpu"),
        (["{picture}", "--top", "0"], "--top"),
    ],
)
def test_bad_input_to_predict_is_one_sentence(words, told, image_bundle, images, tmp_path, capsys):
    picture = images / "validation" / "red" / "0.png"
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(picture.read_bytes()[:200])
    places = {"picture": picture, "truncated": truncated}
    filled = [word.format(**places) for word in words]
    assert main(["predict", str(image_bundle.path), *filled]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out


# --- interrupted ---------------------------------------------------------------------------------


def test_a_killed_export_leaves_no_bundle_and_can_be_repeated(image_run, tmp_path):
    out = tmp_path / "bundles" / "b"
    words = [sys.executable, "-m", "mdpd_deploy", "export", image_run.path, "--out", out]
    child = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("bundles/.b.*.tmp/model.onnx")):
        assert child.poll() is None and time.monotonic() < deadline, "export ended before the kill"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    assert all(path.name.startswith(".") for path in out.parent.iterdir())
    assert verdicts(export_run(image_run.path, out=out))["metric"] == "passed"
    assert list(out.parent.iterdir()) == [out], "what the killed export left is gone"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(image_run, tmp_path):
    def no_file_above_40_kb():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    out = tmp_path / "bundles" / "b"
    words = [sys.executable, "-m", "mdpd_deploy", "export", image_run.path, "--out", out]
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=no_file_above_40_kb,
    )
    assert done.returncode == 1
    assert "could not write" in done.stderr.splitlines()[-1], done.stderr
    assert list(tmp_path.rglob("*")) in ([], [out.parent])


@pytest.mark.parametrize("method", ["probe", "norms"])
def test_constant_norms_do_not_confuse_the_identity_gate(method, images, tiny_vit, tmp_path):
    """A fresh backbone's norms are all ones and zeros, which the exporter merges and folds."""
    run = fit(
        task="classify",
        data=images,
        backbone=str(tiny_vit),
        method=method,
        out=tmp_path / "run",
        set=["backbone.pretrained=false"],
        **SHORT,
    )
    bundle = export_run(run.path)
    assert verdicts(bundle)["identity"] == "passed"
    kept = load_file(bundle.path / "bare_norms.safetensors")
    assert len(kept) == (0 if method == "probe" else len(run.load_bare().backbone.norms()))
    bare = bundle.write_bare_graph(tmp_path / "bare.onnx")
    arrays = bundle.preprocess([images / "validation" / "red" / "0.png"])
    expected = torch_outputs(run.load_bare(), arrays)
    np.testing.assert_allclose(only(OnnxRunner(bare)(arrays)), only(expected), atol=1e-5)


MERGED = [name for name, m in METHODS.items() if issubclass(m, Direct) and not m.deploys_added]


@pytest.mark.parametrize(
    ("method", "kind"), list(zip(MERGED, itertools.cycle(["image", "pair"]), strict=False))
)
def test_rivals_that_change_more_than_norms_export_too(
    method, kind, images, pair_table, tiny_vit, tiny_bert, tmp_path
):
    data = {
        "image": dict(data=images, backbone=tiny_vit),
        "pair": dict(
            data=pair_table,
            text=["one", "two"],
            backbone=tiny_bert,
            set=["data.max_length=20"],
        ),
    }[kind]
    run = fit(task="classify", method=method, out=tmp_path / "run", lr=1e-3, **data, **SHORT)
    bundle = export_run(run.path)
    assert set(verdicts(bundle).values()) == {"passed"}
    assert not (bundle.path / "bare_norms.safetensors").exists()


def test_overwrite_replaces_bundles_only(image_run, tmp_path, monkeypatch):
    run = copy_run(image_run, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for target in (run, tmp_path / "mine", tmp_path):
        with pytest.raises(UserError, match="did not write, and --overwrite replaces only"):
            export_run(run, out=target, overwrite=True, golden="synthetic", metric_gate=False)
    assert (tmp_path / "mine" / "thesis.txt").is_file() and (run / "summary.json").is_file()
    options = dict(golden="synthetic", metric_gate=False)
    bundle = export_run(run, out=tmp_path / "b", **options).path
    assert load_bundle(export_run(run, out=bundle, overwrite=True, **options).path)
    monkeypatch.chdir(bundle)
    with pytest.raises(UserError, match=r"holds .*: choose another folder"):
        export_run(run, out=bundle, overwrite=True, **options)


def test_an_empty_text_is_not_predicted(side_bundle, capsys):
    assert main(["predict", str(side_bundle.path), " "]) == 2
    assert "is empty" in capsys.readouterr().err
