"""`mdpd export --fmt trt` and `mdpd build-engine`, driven with a stand-in for TensorRT."""

import hashlib
import json
import shutil
import sys

import numpy as np
import onnx
import pytest

from mdpd_deploy import build_engine, export_run, load_bundle
from mdpd_deploy.artifacts.sealed import replace_caches
from mdpd_deploy.checks.compare import Case, Limits, compare
from mdpd_deploy.checks.engine import limits
from mdpd_deploy.checks.golden import replay_golden
from mdpd_deploy.cli import main
from mdpd_deploy.errors import ExportError, UserError, VerificationError
from mdpd_deploy.export.tensorrt.layers import check_precision, read_report
from mdpd_deploy.export.tensorrt.profiles import profile_shapes

pytest.importorskip("onnxruntime", reason="runs exported graphs")
RELEASES = ("10.13.3.9", "10.16.1.11", "11.4.0.106")
SYNTHETIC = dict(golden="synthetic", metric_gate=False)


@pytest.fixture
def bundle(tiny_trt_bundle, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_trt_bundle, tmp_path / "b")


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("release", RELEASES)
def test_an_engine_is_built_verified_and_listed(bundle, stand_in, release, capsys):
    stand_in(release)
    assert main(["build-engine", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "built in" in shown and f"TensorRT {release}" in shown and "fp32)" in shown
    manifest = load_bundle(bundle).manifest
    assert manifest["engine"] == {"status": "built", "reason": ""}
    assert set(manifest["caches"]) == {"model.plan", "model.plan.json", "timing.cache"}
    record = json.loads((bundle / "model.plan.json").read_text())
    key = record["key"]
    assert key["tensorrt"] == release and key["gpu"] == "Stand-in GPU" and key["cuda"] == "13.2"
    assert key["compute_capability"] == "9.0" and key["flags"] == ["TF32"]
    assert key["onnx"]["model.onnx"] == manifest["files"]["model.onnx"]["sha256"]
    assert key["timing_cache_sha256"] == manifest["caches"]["timing.cache"]["sha256"]
    assert key["profiles"]["input_ids"] == {"min": [1, 1], "opt": [8, 24], "max": [32, 24]}
    assert record["layers"]["by_type"] == {"fp32": manifest["graphs"][0]["nodes"]}
    assert set(record["layers"]["tensors"]) == {"input_ids", "attention_mask", "token_type_ids", "logits"}  # fmt: skip
    cases = record["parity"]["cases"]
    assert {case["name"] for case in cases} == {
        "golden inputs", "min shape", "opt shape", "max shape", "min batch at the max length",
    }  # fmt: skip
    assert record["parity"]["scaled_diff"] < 1e-4 and record["parity"]["tolerance"] == 3e-2
    assert not list(bundle.parent.glob(".*"))  # nothing is left beside the bundle


def test_the_engine_answers_as_the_graph_does(bundle, stand_in):
    stand_in()
    build_engine(bundle)
    opened = load_bundle(bundle)
    texts = ["very good film", "a dull film was not good"] * 20  # more than the engine's 32
    engine = opened.runner("cuda", runtime="trt")
    assert engine.provider == "TensorRT 11.4.0.106" and engine.max_batch == 32
    assert engine.metadata == opened.runner().metadata
    by_engine = opened.predict(texts, batch=64, runner=engine)
    by_graph = opened.predict(texts)
    for one, other in zip(by_engine, by_graph, strict=True):
        assert one.label == other.label
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_a_plan_that_changed_after_the_check_is_not_loaded(bundle, stand_in):
    stand_in()
    build_engine(bundle)
    opened = load_bundle(bundle)
    plan = bundle / "model.plan"
    plan.write_bytes(plan.read_bytes().replace(b'"detailed": true', b'"detailed":false'))
    with pytest.raises(UserError, match=r"model.plan was changed while it was opened"):
        opened.runner("cuda", runtime="trt")


def test_predict_takes_the_engine(bundle, stand_in, capsys):
    stand_in()
    words = ["predict", str(bundle), "very good film", "--runtime", "trt", "--json"]
    assert main(words) == 2 and "holds no TensorRT engine" in capsys.readouterr().err
    build_engine(bundle)
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["provider"] == "TensorRT 11.4.0.106" and said["predictions"][0]["label"]


def test_an_engine_that_is_as_asked_is_kept_and_any_other_is_built(bundle, stand_in, capsys):
    stand_in()
    assert build_engine(bundle)["reason"] == "the bundle holds none"
    before = listing(bundle)
    assert not build_engine(bundle)["built"] and listing(bundle) == before
    assert main(["build-engine", str(bundle)]) == 0 and "up to date" in capsys.readouterr().out
    assert build_engine(bundle, tf32=False)["reason"] == "the one there has other flags"
    assert build_engine(bundle, tf32=False, rebuild=True)["built"]
    stand_in("10.16.1.11")
    assert "TensorRT 11.4.0.106, this machine has 10.16.1.11" in build_engine(bundle)["reason"]
    load_bundle(bundle)


def test_every_option_reaches_the_builder(bundle, stand_in, capsys):
    stand_in()
    words = ["--static-batch", "4", "--no-tf32", "--version-compatible", "--refit", "--json"]
    words += ["--hardware-compatible", "ampere+", "--workspace", "64"]
    assert main(["build-engine", str(bundle), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    key = record["key"]
    assert key["flags"] == ["REFIT_INDIVIDUAL", "VERSION_COMPATIBLE"]
    assert key["hardware"] == "ampere+" and key["workspace_bytes"] == 64 << 20
    assert key["profiles"]["input_ids"] == {"min": [4, 1], "opt": [4, 24], "max": [4, 24]}
    norms = {name for name in key["refit"] if "norm" in name.lower()}
    assert norms and {name for name in key["refit"] if name.startswith("head.")}
    assert record["parity"]["tolerance"] == 1e-4  # without TF32
    assert len(load_bundle(bundle).predict(["good film"] * 6, runner=engine_of(bundle))) == 6


def engine_of(bundle):
    return load_bundle(bundle).runner("cuda", runtime="trt")


def test_without_a_gpu_the_recipe_carries_what_was_chosen(tiny_run, tmp_path, stand_in, capsys):
    _, cuda = stand_in()
    cuda._gpu["count"] = 0
    out = tmp_path / "b"
    words = ["export", tiny_run.path, "--fmt", "trt", "--out", out, "--no-metric-gate"]
    words += ["--golden", "synthetic", "--static-batch", 2, "--no-tf32", "--version-compatible"]
    words += ["--refit", "--workspace", 512, "--hardware-compatible", "same-compute-capability"]
    assert main([*map(str, words)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.count("no TensorRT engine was built: no GPU can be used here (none is visible)") == 1
    )
    assert main([*map(str, words), "--require-engine"]) == 1
    assert "--require-engine: no TensorRT engine" in capsys.readouterr().err
    recipe = json.loads((out / "build_engine.json").read_text())
    assert recipe["options"] == {
        "static_batch": 2, "tf32": False, "version_compatible": True, "refit": True,
        "workspace_mib": 512, "hardware_compatible": "same-compute-capability",
    }  # fmt: skip
    script = (out / "build_engine.sh").read_text()
    for word in (
        "--minShapes=pixel_values:2x3x16x16", "--noTF32", "--versionCompatible", "--refit",
        "--hardwareCompatibilityLevel=sameComputeCapability", "--memPoolSize=workspace:512M",
    ):  # fmt: skip
        assert word in script
    cuda._gpu["count"] = 1
    key = build_engine(out, static_batch=0, hardware_compatible="none")["key"]
    assert key["flags"] == ["REFIT_INDIVIDUAL", "VERSION_COMPATIBLE"] and key["hardware"] == "none"
    assert key["refit"] == recipe["refit"]
    assert key["profiles"]["pixel_values"]["max"] == [32, 3, 16, 16]  # the override


def test_export_builds_the_engine_where_it_can(tiny_run, tmp_path, stand_in, capsys):
    stand_in()
    words = ["export", tiny_run.path, "--fmt", "trt", "--out", tmp_path / "b", "--require-engine"]
    assert main([*map(str, words), "--golden", "synthetic", "--no-metric-gate"]) == 0
    assert capsys.readouterr().err.count("no TensorRT engine") == 0
    opened = load_bundle(tmp_path / "b")
    assert opened.manifest["engine"]["status"] == "built"
    assert (opened.path / "model.plan").is_file() and (opened.path / "build_engine.sh").is_file()
    trt, _ = stand_in()
    trt._faults["build"] = "no kernel"
    with pytest.raises(ExportError, match="no kernel"):
        export_run(tiny_run.path, fmt="trt", out=tmp_path / "c", **SYNTHETIC)
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


@pytest.mark.usefixtures("unwarmed")
def test_auto_times_an_engine_of_every_precision(tiny_run, tmp_path, stand_in, monkeypatch):
    """Without ModelOpt the two that need it are rows that say so."""
    monkeypatch.delenv("MDPD_AUTOCAST_PYTHON", raising=False)
    stand_in()
    words = ["export", tiny_run.path, "--precision", "auto", "--target", "gpu", "--seconds", "0.05"]
    out = tmp_path / "b"
    words += ["--out", out, "--parity", "warn", "--static-batch", "4", "--version-compatible"]
    assert main([*map(str, words)]) == 0
    manifest = load_bundle(out).manifest
    tried = manifest["precision_trials"]
    rows = {row["precision"]: row for row in tried["trials"]}
    assert list(rows) == ["fp32", "fp16", "bf16", "int8-trt"]
    assert all("--autocast-python" in rows[name]["reason"] for name in ("fp16", "bf16"))
    assert rows["int8-trt"]["ratio"] > 0 and rows["fp32"]["timing"] == "control"
    assert tried["settings"]["gpu"] == "Stand-in GPU" and tried["settings"]["batch"] == 4
    assert tried["recommendation"].endswith("; fp16 and bf16 failed")
    record = json.loads((out / "model.plan.json").read_text())
    assert record["key"]["precision"] == manifest["precision"] == tried["chosen"]
    assert json.loads((out / "build_engine.json").read_text())["precision"] == tried["chosen"]
    trt, _ = stand_in()
    trt._faults["drift"] = 0.5  # in every engine, so in that of fp32
    with pytest.raises(VerificationError, match="engine parity: outputs are off"):
        export_run(tiny_run.path, precision="auto", target="gpu", seconds=0.05, out=tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


FAULTS = {
    "parse": (
        [["Foo", "/a", "no importer"], ["Foo", "/b", "no importer"], ["Bar", "", "bad", "INVALID_NODE", ["f", "g"]]],
        ExportError, r"2 x Foo at /a: no importer \(UNSUPPORTED_NODE\); Bar in f > g: bad",
    ),
    "profile": (True, ExportError, "refuses the shapes"),
    "add_profile": (True, ExportError, "refuses the shapes .*the profile is not valid"),
    "build": ("Could not find\nany implementation.", ExportError, "could not build the engine within .*: Could not find any implementation"),
    "pool": (True, ExportError, "--workspace 64: TensorRT refuses this limit"),
    "deserialize": (True, Exception, "refuses the engine model.plan: Magic tag"),
    "context": (True, Exception, "could not make room to run the engine: OutOfMemory"),
    "inspector": ("not JSON", ExportError, "cannot read"),
    "layers": ("Half", VerificationError, "fp32 was asked for, but the engine has fp16 layers"),
    "set_input_shape": (True, Exception, "refused the shape of input_ids: input_ids is outside"),
    "infer_shapes": (True, Exception, "cannot tell the shape of somewhere"),
    "set_tensor_address": (True, Exception, "refused memory for"),
    "execute": (True, Exception, "refused the run: the enqueue failed"),
    "drift": (0.5, VerificationError, "engine parity: outputs are off by .* allowed 3e-02; the bundle is as it was"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_one_sentence_and_leaves_the_bundle(bundle, stand_in, fault):
    how, error, words = FAULTS[fault]
    trt, _ = stand_in()
    trt._faults[fault] = how
    before = listing(bundle)
    with pytest.raises(error, match=words) as refused:
        build_engine(bundle, workspace=64)
    assert "\n" not in str(refused.value) and refused.value.exit_code in (1, 2)
    assert listing(bundle) == before and not list(bundle.parent.glob(".*"))
    load_bundle(bundle)


CUDA_FAULTS = {
    "cudaGetDeviceCount": (35, UserError, "no GPU can be used here .cudaErrorInsufficientDriver"),
    "cudaMalloc": (True, Exception, "cudaMalloc failed on the GPU: cudaErrorMemoryAllocation"),
    "cudaStreamSynchronize": (700, Exception, "cudaStreamSynchronize failed .*IllegalAddress"),
}


@pytest.mark.parametrize("fault", CUDA_FAULTS)
def test_what_fails_on_the_gpu_is_one_sentence(bundle, stand_in, fault):
    how, error, words = CUDA_FAULTS[fault]
    _, cuda = stand_in()
    cuda._faults[fault] = how
    before = listing(bundle)
    with pytest.raises(error, match=words):
        build_engine(bundle)
    assert listing(bundle) == before


def test_a_small_workspace_is_named(bundle, stand_in):
    stand_in()
    with pytest.raises(ExportError, match=r"within --workspace 1 \(MiB\): OutOfMemory"):
        build_engine(bundle, workspace=1)


def test_a_forgotten_input_is_found_before_the_build(bundle, stand_in):
    stand_in()
    from mdpd_deploy.export.tensorrt.build import build_plan
    from mdpd_deploy.export.tensorrt.options import EngineOptions

    manifest = load_bundle(bundle).manifest
    profiles = profile_shapes(manifest["graphs"][0])
    for change in ({"other": profiles["input_ids"]}, {}):
        wrong = {name: profiles[name] for name in list(profiles)[:2]} | change
        with pytest.raises(ExportError, match="the graph's inputs are attention_mask, input_ids"):
            build_plan(bundle / "model.onnx", wrong, EngineOptions())
    long = {name: {**p, "opt": [8, 24, 1]} for name, p in profiles.items()}
    with pytest.raises(ExportError, match=r"input_ids is \(-1, -1\), the shape spec's opt is"):
        build_plan(bundle / "model.onnx", long, EngineOptions())
    upside_down = {name: {**p, "min": p["max"], "max": p["min"]} for name, p in profiles.items()}
    with pytest.raises(ExportError, match="refuses the shapes"):
        build_plan(bundle / "model.onnx", upside_down, EngineOptions())


def test_a_dynamically_quantised_graph_is_refused_by_its_causes(bundle, stand_in, tmp_path):
    stand_in()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from mdpd_deploy.export.tensorrt.build import build_plan
    from mdpd_deploy.export.tensorrt.options import EngineOptions

    proto = onnx.load(bundle / "model.onnx")
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "q.onnx", weight_type=QuantType.QInt8)
    with pytest.raises(ExportError, match=r"\d+ x DynamicQuantizeLinear.*\d+ x MatMulInteger"):
        build_plan(tmp_path / "q.onnx", {}, EngineOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"static_batch": -1}, "--static-batch -1"),
        ({"workspace": 0}, "--workspace 0"),
        ({"hardware_compatible": "volta"}, "--hardware-compatible: unknown 'volta'"),
    ],
)
def test_options_that_cannot_be_are_refused(bundle, stand_in, options, words, tiny_run, tmp_path):
    stand_in()
    with pytest.raises(UserError, match=words):
        build_engine(bundle, **options)
    with pytest.raises(UserError, match=words):
        export_run(tiny_run.path, fmt="trt", out=tmp_path / "b", **options)
    with pytest.raises(UserError, match="belongs to --fmt trt"):
        export_run(tiny_run.path, out=tmp_path / "b", **options)


def test_refit_needs_a_method_that_tunes_norms(bundle, stand_in):
    stand_in()
    (bundle / "bare_norms.safetensors").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["bare_norms.safetensors"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--refit: only an fp32 bundle whose method tunes norms"):
        build_engine(bundle, refit=True)


# --- where TensorRT is not ------------------------------------------------------------------------


def test_build_engine_without_tensorrt_says_so_and_changes_nothing(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    before = listing(bundle)
    assert main(["build-engine", str(bundle)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert 'pip install "mdpd-deploy[trt]"' in said.err
    assert listing(bundle) == before


@pytest.mark.parametrize("release", ["10.9.0.34", "12.0.1", "abc"])
def test_a_release_that_was_not_tried_is_refused(bundle, stand_in, release):
    trt, _ = stand_in()
    trt.__version__ = release
    with pytest.raises(UserError, match=r"works with 10\.12 up to, not including, 12"):
        build_engine(bundle)


# --- the cache ------------------------------------------------------------------------------------


def rekey(bundle, **change):
    """Rewrite the engine's record as one who moves engines about would, hashes included."""
    record = json.loads((bundle / "model.plan.json").read_text())
    record["key"] |= change
    staging = bundle.parent / "staging"
    staging.mkdir()
    for name in ("model.plan", "timing.cache"):
        shutil.copy(bundle / name, staging / name)
    (staging / "model.plan.json").write_text(json.dumps(record))
    names = ["model.plan", "model.plan.json", "timing.cache"]
    replace_caches(bundle, staging, names, {"status": "built", "reason": ""})


FOREIGN = {
    "graph": ({"onnx": {"model.onnx": "0" * 64}}, "was built from another model.onnx"),
    "tensorrt": ({"tensorrt": "11.3.0.1"}, "built by TensorRT 11.3.0.1, this machine has 11.4"),
    "gpu": (
        {"gpu": "Other"},
        r"built for Other \(compute capability 9.0\), this machine has Stand",
    ),
    "capability": (
        {"hardware": "same-compute-capability", "compute_capability": "8.6"},
        r"this machine has Stand-in GPU \(9.0\)",
    ),
    "driver": ({"driver": "1.2"}, "built with driver 1.2"),
    "cuda": ({"cuda": "12.8"}, "built with CUDA 12.8, this machine has 13.2"),
    "timing": ({"timing_cache_sha256": "0" * 64}, "describes another engine"),
    "damaged": ({"flags": 7}, "model.plan.json in .* is damaged"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_engine_is_refused_and_rebuilt(bundle, stand_in, name):
    change, words = FOREIGN[name]
    stand_in()
    build_engine(bundle)
    rekey(bundle, **change)
    with pytest.raises(UserError, match=words) as refused:
        engine_of(bundle)
    assert "mdpd build-engine" in str(refused.value)
    assert build_engine(bundle)["built"]
    engine_of(bundle)


def test_compatible_engines_run_elsewhere(bundle, stand_in):
    stand_in("10.16.1.11")
    build_engine(bundle, version_compatible=True, hardware_compatible="ampere+")
    _, cuda = stand_in("11.4.0.106")
    cuda._gpu.update(name=b"Newer GPU", major=10)
    rekey(bundle, driver="1.2", cuda="12.8")  # machines with other GPUs have other drivers too
    engine_of(bundle)
    cuda._gpu.update(name=b"Older GPU", major=7)
    with pytest.raises(UserError, match=r"this machine has Older GPU \(7.0\)"):
        engine_of(bundle)
    stand_in("10.13.3.9")
    with pytest.raises(UserError, match=r"built by TensorRT 10\.16.1.11, this machine has 10.13"):
        engine_of(bundle)


def test_a_timing_cache_of_another_gpu_is_not_used(bundle, stand_in, caplog):
    _, cuda = stand_in()
    build_engine(bundle)
    cuda._gpu["name"] = b"Other GPU"
    caplog.set_level("INFO")
    assert build_engine(bundle)["key"]["gpu"] == "Other GPU"
    assert "timing cache is of another GPU" in caplog.text
    assert b"Other GPU" in (bundle / "timing.cache").read_bytes()


def test_without_an_engine_the_runtime_is_refused(bundle, stand_in):
    stand_in()
    with pytest.raises(UserError, match=r"holds no TensorRT engine: .*mdpd build-engine"):
        engine_of(bundle)
    with pytest.raises(UserError, match="runs with --device cuda only"):
        load_bundle(bundle).runner(runtime="trt")
    with pytest.raises(UserError, match="--runtime: unknown 'tflite'"):
        load_bundle(bundle).runner(runtime="tflite")


def test_a_changed_engine_is_refused(bundle, stand_in):
    stand_in()
    build_engine(bundle)
    plan = bundle / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"model\.plan is not the file that was exported"):
        load_bundle(bundle)


@pytest.mark.parametrize("steps", range(8))
def test_a_kill_while_the_engine_is_exchanged_leaves_a_sound_bundle(
    bundle, stand_in, steps, monkeypatch
):
    """Stop after every single change to the folder, as kill -9 would."""
    from mdpd_deploy.artifacts import sealed

    class Killed(BaseException):
        pass

    stand_in()
    build_engine(bundle)
    left = [steps]

    def counted(function):
        def call(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(sealed.os, "replace", counted(sealed.os.replace))
        patch.setattr(sealed.Path, "unlink", counted(sealed.Path.unlink))
        patch.setattr(sealed, "write_json", lambda path, value: path.write_text(json.dumps(value)))
        with pytest.raises(Killed):
            staging = bundle.parent / "staging"
            staging.mkdir()
            names = ["model.plan", "model.plan.json", "timing.cache"]
            for name in names:
                (staging / name).write_bytes((bundle / name).read_bytes() + b" ")
            replace_caches(bundle, staging, names, {"status": "built", "reason": ""})
            assert steps == 7
            raise Killed
    load_bundle(bundle)
    build_engine(bundle)
    engine_of(bundle)


# --- reading what TensorRT says -------------------------------------------------------------------


def test_the_layer_report_reads_both_forms():
    ten = {
        "Layers": [
            {"Name": "a", "Outputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format where C % 8 == 0"}]},
            {"Name": "b", "Outputs": [{"Name": "y", "Format/Datatype": "Half"}]},
            {"Name": "c", "Outputs": [{"Name": "z", "Format/Datatype": "Row major linear FP32"}]},
        ],
        "Bindings": ["z"],
    }  # fmt: skip
    eleven = {
        "Layers": [
            {"Name": "a", "Outputs": [{"Name": "x", "Format": "Row major", "DataType": "Half"}]},
            {"Name": "b", "Outputs": [{"Name": "y", "Format": "N/A", "Datatype": "FP16"}]},
            {"Name": "c", "Outputs": [{"Name": "z", "DataType": "Float"}]},
        ],
        "I/O Tensors": [{"Name": "z", "IOMode": "Output", "DataType": "Float"}],
    }
    for plain in (ten, eleven):
        report = read_report(plain, "fp16")
        assert report.by_type == {"fp16": 2, "fp32": 1} and report.fp32_islands == ["c"]
        assert report.tensors == {"z": "fp32"}
        check_precision(report, "fp16")
        for asked in ("fp32", "bf16", "int8-trt"):
            with pytest.raises(VerificationError, match=f"{asked} was asked for"):
                check_precision(report, asked)
    with pytest.raises(VerificationError, match="only 0 of 1 layers compute in it"):
        check_precision(read_report(ten | {"Layers": ten["Layers"][2:]}, "fp16"), "fp16")
    assert read_report({"Layers": ["just a name"]}, "fp32").by_type == {"unknown": 1}


def layer(kind, reads, writes, name="x"):
    def tensors(types):
        return [{"Name": "t", "Format/Datatype": told} for told in types.split()]

    return {"Name": name, "LayerType": kind, "Inputs": tensors(reads), "Outputs": tensors(writes)}


def refusal(precision, *layers):
    """Return why an engine of these layers is refused; "" when it is taken."""
    try:
        check_precision(read_report({"Layers": list(layers)}, precision), precision)
    except VerificationError as err:
        return str(err)
    return ""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8-trt"])
@pytest.mark.parametrize(
    "nothing", ["only a name", {"Name": "a"}, layer("gemm", "N/A", "N/A"), layer("a", "", "Int64")]
)
def test_an_engine_of_which_nothing_is_known_is_refused(precision, nothing):
    told = refusal(precision, nothing, nothing)
    assert f"any of the engine's 2 layers computes, so nothing shows that it is {precision}" in told


def test_one_reduced_layer_among_many_is_not_the_precision():
    few = [layer("gemm", "FP32 FP32", "FP32")] * 200
    for precision, kind in (("fp16", "Half"), ("bf16", "BFloat16"), ("int8-trt", "INT8")):
        one = layer("gemm", kind, kind)
        told = refusal(precision, one, *few)
        assert f"{precision} was asked for, but only 1 of 201 layers with matrix products" in told
        assert not refusal(precision, *[one] * 200, *few)
        assert refusal(precision, *[one] * 199, *few)


def test_layers_without_products_do_not_count():
    casts = [layer("Reformat", "FP32", "Half", name="Reformatting CopyNode for /MatMul")] * 50
    assert "only 0 of 1 layers with" in refusal("fp16", layer("gemm", "FP32", "FP32"), *casts)
    norms = [layer("kgen", "FP32", "FP32", name="norm")] * 50
    assert not refusal("fp16", layer("gemm", "Half", "Half"), *norms)
    fused = layer("kgen", "Half Half", "Float", name="__myl_MatmulAdd_0")
    assert not refusal("fp16", fused, *norms)
    silent = [layer("gemm", "", "")] * 2
    assert "only 1 of 3" in refusal("fp16", layer("gemm", "Half", "Half"), *silent)


def test_every_output_of_a_layer_is_read():
    both = layer("kgen", "FP32", "FP32 Half")
    assert "fp32 was asked for, but the engine has fp16 layers" in refusal("fp32", both)
    assert not refusal("fp16", layer("kgen", "FP32", "Int64 Half"))
    report = read_report({"Layers": [layer("TopK", "FP32", "Int32 FP32"), both]}, "fp16")
    assert report.by_type == {"fp32": 1, "fp16": 1} and report.products == {}


def test_an_eight_bit_product_may_write_floats():
    assert not refusal("int8-trt", layer("CaskGemmConvolution", "INT8", "FP32"))
    assert refusal("int8-trt", layer("CaskGemmConvolution", "FP32", "INT8"))


def test_profiles_are_checked_at_the_door():
    inputs = [{"name": "x", "shape": ["batch", "sequence", 8]}]
    with pytest.raises(UserError, match=r"nothing of the axis 'sequence'"):
        profile_shapes({"inputs": inputs, "shapes": {"batch": dict(min=1, opt=2, max=4)}})
    with pytest.raises(UserError, match=r"shapes\.batch must be min <= opt <= max"):
        profile_shapes({"inputs": inputs, "shapes": {"batch": dict(min=1, opt=8, max=4)}})


# --- parity ---------------------------------------------------------------------------------------


class Answers:
    """Gives a changed form of its input."""

    def __init__(self, change):
        self.change = change

    def __call__(self, arrays):
        return {"y": self.change(arrays["x"])}


WRONG = {
    "five times the opposite": lambda outputs: -5 * outputs,
    "a constant": lambda outputs: np.full_like(outputs, 100),
    "classes exchanged": lambda outputs: outputs[:, ::-1],
    "not finite": lambda outputs: outputs * np.float32(np.nan),
    "infinite": lambda outputs: outputs + np.float32(np.inf),
    "one more class": lambda outputs: np.concatenate([outputs, outputs[:, :1]], axis=1),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-trt"])
@pytest.mark.parametrize("name", WRONG)
def test_an_engine_that_answers_something_else_fails_in_every_precision(name, precision):
    wanted = np.random.default_rng(0).standard_normal((9, 3), dtype=np.float32)
    held_to = limits(precision, tf32=True, known=0.1)
    cases = [Case("a", {"x": wanted}, {"y": wanted})]
    assert compare(Answers(lambda x: x), cases, held_to).passed
    assert not compare(Answers(WRONG[name]), cases, held_to).passed


def test_int8_may_be_off_by_twice_what_its_graph_was():
    wanted = np.random.default_rng(0).standard_normal((9, 3), dtype=np.float32)
    cases = [Case("a", {"x": wanted}, {"y": wanted})]

    def passes(share, known):
        shift = np.float32([share * wanted.std(), 0, 0])
        held_to = limits("int8-trt", tf32=True, known=known)
        return compare(Answers(lambda x: x + shift), cases, held_to).passed

    assert passes(0.19, 0.1) and not passes(0.21, 0.1)
    assert passes(0.029, 0) and not passes(0.031, 0)


def test_clear_predictions_are_told_by_the_reference_alone():
    """However far off an engine is, that makes no prediction unclear."""
    wanted = np.float32([[1, 0], [0, 1], [3, 2], [0.01, 0]])
    off = compare(
        Answers(lambda x: x[:, ::-1]),
        [Case("a", {"x": wanted}, {"y": wanted})],
        Limits(9, 0.1, 0.99),
    )
    assert off.agreement == 0 and not off.passed


@pytest.fixture(scope="module")
def int8_bundle(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "b"
    words = dict(precision="int8-trt", fmt="trt", parity="warn", out=out, **SYNTHETIC)
    return export_run(tiny_run.path, **words).path


@pytest.mark.parametrize("name", ["five times the opposite", "a constant", "not finite"])
def test_an_int8_engine_that_answers_something_else_is_not_kept(
    int8_bundle, tmp_path, stand_in, name
):
    bundle = shutil.copytree(int8_bundle, tmp_path / "b")
    trt, _ = stand_in()
    trt._faults["outputs"] = WRONG[name]
    with pytest.raises(VerificationError, match="engine parity: "):
        build_engine(bundle)
    assert not (bundle / "model.plan").exists()


def test_an_engine_that_is_built_is_one_that_a_server_takes(int8_bundle, tmp_path, stand_in):
    """Also where its batch is smaller than the number of golden inputs."""
    bundle = shutil.copytree(int8_bundle, tmp_path / "b")
    stand_in()
    record = build_engine(bundle, static_batch=3)
    proto = onnx.load(bundle / "model.onnx")
    kinds = [node.op_type for node in proto.graph.node]
    attention = 2 * kinds.count("Softmax")  # products of two activations stay as they are
    products = sum(kind in ("MatMul", "Gemm", "Conv") for kind in kinds)
    assert record["layers"]["products"] == {"int8": products - attention, "fp32": attention}
    replay = json.loads((bundle / "parity.json").read_text())["golden"]["output_diff"]
    assert record["parity"]["tolerance"] == max(3e-2, 2 * replay)
    replay_golden(load_bundle(bundle), engine_of(bundle))


def test_an_engine_that_a_server_would_refuse_is_not_kept(bundle, stand_in):
    trt, _ = stand_in()
    trt._faults["drift"] = 0.01  # fine by the spread over all shapes
    build_engine(bundle)
    parity = json.loads((bundle / "parity.json").read_text())
    parity["parity"]["spread"] /= 10
    (bundle / "parity.json").write_text(json.dumps(parity))
    manifest = json.loads((bundle / "manifest.json").read_text())
    raw = (bundle / "parity.json").read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    manifest["files"]["parity.json"] = entry
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="golden vectors come out wrong on this device"):
        build_engine(bundle, rebuild=True)
