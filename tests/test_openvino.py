"""OpenVINO beside ONNX Runtime: the same file, the same numbers, nothing written, nothing sent."""

import importlib.util
import sys

import numpy as np
import onnx
import pytest

from mdpd_deploy import bench_latency, export_run, load_bundle, verify_bundle
from mdpd_deploy.cli import main
from mdpd_deploy.commands.evaluate import evaluate_bundle
from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.openvino import OpenVinoRunner, import_openvino
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.request_core import RequestCore

pytest.importorskip("openvino", reason="runs exported graphs")
pytest.importorskip("onnxruntime", reason="runs them too")


@pytest.fixture(params=["tiny_bundle", "tiny_text_bundle"])
def bundle(request):
    return request.getfixturevalue(request.param)


def test_it_gives_what_onnx_runtime_gives(bundle):
    usual, other = bundle.runner(), bundle.runner(runtime="openvino")
    for name in ("input_names", "output_names", "metadata", "device", "max_batch"):
        assert getattr(other, name) == getattr(usual, name)
    golden = bundle.golden()
    for rows in (1, len(golden.raws)):
        arrays = {name: array[:rows] for name, array in golden.arrays.items()}
        expected, found = only(usual(arrays)), only(other(arrays))
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * expected.std()


def test_what_it_would_read_as_something_else_is_refused(tiny_bundle):
    """OpenVINO itself takes each of these and gives numbers."""
    runner, arrays = tiny_bundle.runner(runtime="openvino"), tiny_bundle.golden().arrays
    (name,) = arrays
    pixels = arrays[name]
    for given, told in [
        ({}, f"'{name}' is missing"),
        ({name: pixels.astype(np.int64)}, "is int64, not float32"),
        ({name: pixels[:, :2]}, r"has the shape \[8, 2, 16, 16\], not \[\?,3,16,16\]"),
        ({name: pixels, "more": pixels}, "'more' is none of the graph's"),
    ]:
        with pytest.raises(WorkFailed, match=told):
            runner(given)


def test_every_verb_runs_it(tiny_bundle, capsys):
    report = verify_bundle(tiny_bundle.path, runtime="openvino")
    assert not report.unsound
    assert any("replayed on OpenVINO" in check.note for check in report.checks)
    data = str(tiny_bundle.path)  # no data: refused before anything runs
    assert main(["eval", data, "--runtime", "torch"]) == 2
    assert main(["predict", str(tiny_bundle.path), "x.png", *OPENVINO, "--device", "cuda"]) == 2
    assert "OpenVINO runs on the CPU here; use --device cpu" in capsys.readouterr().err
    core = RequestCore.open({"m": tiny_bundle.path}, CoreOptions(runtime="openvino"))
    assert core.describe_model("m")["platform"] == "openvino"
    told = core.describe_tasks("m")
    assert (told["provider"], told["precision"]) == ("OpenVINO", "fp32")


OPENVINO = ("--runtime", "openvino")


def test_a_bundle_is_measured_with_it(tiny_bundle, digit_folder):
    words = dict(data=str(digit_folder / "validation"), batch=8, device="cpu")
    usual = evaluate_bundle(tiny_bundle.path, **words)
    found = evaluate_bundle(tiny_bundle.path, **words, runtime="openvino")
    assert (found.runtime, found.provider) == ("openvino", "OpenVINO")
    assert found.metrics == usual.metrics


@pytest.mark.usefixtures("unwarmed")
def test_it_is_timed_beside_onnx_runtime(tiny_bundle, tmp_path):
    words = dict(runtime=["onnx", "openvino"], batch=[1], seconds=0.1, threads=1)
    report = bench_latency(tiny_bundle.path, **words, out=tmp_path / "latency")
    rows = {(row["runtime"], row["variant"]): row for row in report["rows"]}
    assert {runtime for runtime, _ in rows} == {"onnx", "openvino"}
    row = rows["openvino", "deployed"]
    assert row["p50_ms"] > 0 and row["precision"] == "fp32"
    assert row["nodes"] == tiny_bundle.graph()["nodes"]
    with pytest.raises(UserError, match="OpenVINO runs on the CPU here"):
        bench_latency(tiny_bundle.path, runtime=["openvino"], device="cuda", out=tmp_path / "gpu")


def test_without_the_package_the_extra_is_named(tiny_bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for words in (["verify"], ["predict"], ["bench-latency"]):
        inputs = ["x.png"] if words == ["predict"] else []
        assert main([*words, str(tiny_bundle.path), *inputs, *OPENVINO]) == 2
        assert 'pip install "mdpd-deploy[openvino]"' in capsys.readouterr().err


def test_bytes_that_are_no_graph_are_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a graph that OpenVINO can load: Unable to read"):
        OpenVinoRunner(tmp_path / "model.onnx")


WATCHED = """
import sys
seen = []
def hook(event, words):
    if event in ("socket.connect", "socket.getaddrinfo"):
        seen.append((event, *words))
    if event == "open" and isinstance(words[1], str) and set(words[1]) & set("wax+"):
        seen.append((event, *words))
    if event == "os.mkdir":
        seen.append((event, *words))
sys.addaudithook(hook)
from pathlib import Path
from mdpd_deploy.runtimes.openvino import OpenVinoRunner, import_openvino
OpenVinoRunner(Path(sys.argv[1]))
import nncf.telemetry
import openvino
nncf.telemetry.telemetry.send_event("a", "b", "c")
openvino.convert_model(sys.argv[1])
print([one for one in seen if one[1] != "/dev/null"])
"""


def test_nothing_is_written_and_nothing_is_sent(tiny_bundle, run_python, tmp_path):
    """A plain `import openvino` makes files in the home folder and sends an event."""
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("nncf, which quantises graphs, is not installed")
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = run_python("-c", WATCHED, str(tiny_bundle.path / "model.onnx"), **home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and not list(tmp_path.iterdir())


# --- precisions ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bf16(tiny_text_run, tmp_path_factory):
    if "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 units")
    out = tmp_path_factory.mktemp("openvino") / "bf16"
    return export_run(tiny_text_run.path, precision="bf16", target="cpu", parity="warn", out=out)


def test_bf16_on_a_cpu_is_how_the_fp32_graph_is_run(bf16, tiny_text_bundle):
    manifest = bf16.manifest
    assert (manifest["precision"], manifest["runtime"]) == ("bf16", "openvino")
    assert manifest["files"]["model.onnx"] == tiny_text_bundle.manifest["files"]["model.onnx"]
    golden = bf16.golden()
    exact, expected = (only(b.runner()(golden.arrays)) for b in (tiny_text_bundle, bf16))
    away = np.abs(exact - expected).max() / exact.std()
    assert 1e-4 < away <= 0.2  # bfloat16 has 8 bits, and the outputs of random weights lie close
    as_fp32 = only(bf16.runner(runtime="onnx")(golden.arrays))
    assert np.array_equal(as_fp32, exact)
    assert set(manifest["receipt"]["compute_nodes"]) == {"bfloat16"}


def test_bf16_is_verified_as_it_runs_and_its_graph_as_fp32(bf16, sentence_folder):
    words = dict(eval_data=str(sentence_folder / "validation.csv"))
    for runtime, provider in ((None, "OpenVINO"), ("onnx", "CPUExecutionProvider")):
        checks = {
            one.name: one for one in verify_bundle(bf16.path, **words, runtime=runtime).checks
        }
        for name in ("identity", "golden", "metric"):
            assert checks[name].verdict == "passed", checks[name]
        assert provider in checks["golden"].note


def test_a_server_says_what_it_computes_in(bf16):
    for runtime, told in ((None, "bf16"), ("openvino", "bf16"), ("onnx", "fp32")):
        core = RequestCore.open({"m": bf16.path}, CoreOptions(runtime=runtime))
        assert core.describe_tasks("m")["precision"] == told


def test_bf16_is_not_claimed_where_the_processor_computes_in_float32(
    bf16, tiny_text_run, tmp_path, monkeypatch, capsys
):
    """The property of what was compiled is read back, whatever was asked for."""
    core = import_openvino().Core
    plain = core.compile_model
    told = "bf16 was asked for and OpenVINO computes in f32 on this processor"

    def without_units(self, model, device, settings):
        return plain(self, model, device, {**settings, "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(core, "compile_model", without_units)
    with pytest.raises(UserError, match=f"{told}.*--runtime onnx"):
        RequestCore.open({"m": bf16.path}, CoreOptions())
    assert main(["verify", str(bf16.path)]) == 1
    words = ["--precision", "bf16", "--target", "cpu", "--out", str(tmp_path / "b")]
    assert main(["export", str(tiny_text_run.path), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.usefixtures("unwarmed")
def test_each_runtime_is_timed_in_its_own_precision(bf16, tmp_path):
    words = dict(runtime=["onnx", "openvino"], batch=[1], seconds=0.1, threads=1)
    report = bench_latency(bf16.path, **words, out=tmp_path / "latency")
    found = {(row["runtime"], row["precision"]) for row in report["rows"]}
    assert found == {("onnx", "fp32"), ("openvino", "bf16")}


def test_int8_for_openvino_is_static_and_holds_our_weights(tiny_text_run, tmp_path, capfd):
    pytest.importorskip("nncf", reason="quantises graphs")
    options = dict(precision="int8-openvino", golden="synthetic", parity="warn")
    bundle = export_run(tiny_text_run.path, **options, out=tmp_path / "b")
    manifest = load_bundle(bundle.path).manifest
    assert (manifest["precision"], manifest["runtime"]) == ("int8-openvino", "openvino")
    assert manifest["receipt"]["weights_share"] >= 0.9
    assert "ranges from 60 training inputs" in manifest["conversion"]
    operators = {node.op_type for node in onnx.load(bundle.path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert "DynamicQuantizeLinear" not in operators
    assert bundle.runner().products["int8"] > bundle.runner().products["float32"]
    assert not verify_bundle(bundle.path).unsound
    assert capfd.readouterr().out == ""


def test_bf16_without_the_package_names_the_extra(tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    words = ["--precision", "bf16", "--target", "cpu"]
    assert main(["export", str(tiny_run.path), *words]) == 2
    assert 'pip install "mdpd-deploy[openvino]"' in capsys.readouterr().err
