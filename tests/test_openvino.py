"""OpenVINO beside ONNX Runtime: the same file, the same numbers, nothing written, nothing sent."""

import sys

import numpy as np
import pytest

from mdpd_deploy import bench_latency, verify_bundle
from mdpd_deploy.cli import main
from mdpd_deploy.commands.evaluate import evaluate_bundle
from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.openvino import OpenVinoRunner
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
from mdpd_deploy.runtimes.openvino import OpenVinoRunner
OpenVinoRunner(Path(sys.argv[1]))
import nncf.telemetry
import openvino
nncf.telemetry.telemetry.send_event("a", "b", "c")
openvino.convert_model(sys.argv[1])
print([one for one in seen if one[1] != "/dev/null"])
"""


def test_nothing_is_written_and_nothing_is_sent(tiny_bundle, run_python, tmp_path):
    """A plain `import openvino` makes files in the home folder and sends an event."""
    pytest.importorskip("nncf", reason="quantises graphs")
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = run_python("-c", WATCHED, str(tiny_bundle.path / "model.onnx"), **home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and not list(tmp_path.iterdir())
