"""The exported graphs go through NVIDIA's own parser and builder, ahead of time on the CPU.

TensorRT-RTX is a sibling of TensorRT 11 whose wheels are complete. Its licence is NVIDIA's: the wheels
are fetched where these tests run and never kept with the project. It can build but not run here, and
it cannot make a refittable engine without a GPU; so the network is marked and parsed, not built, there.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.network
VERSION = "1.7.1.116"

_BUILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_rtx_bindings as trt
sys.modules["tensorrt"] = trt
trt.__version__ = "11.0"   # of RTX's own counting; its API is that of TensorRT 11
from pathlib import Path
from mdpd_deploy.artifacts.bundle import load_bundle
from mdpd_deploy.errors import ExportError
from mdpd_deploy.export.tensorrt import install, network, profiles, swap
from mdpd_deploy.runtimes.tensorrt.library import recording_logger

bundle = load_bundle(sys.argv[2])
manifest = bundle.manifest
logger = recording_logger(trt)
builder = trt.Builder(logger)
kind, graph = sys.argv[3], bundle.path / "model.onnx"
profiles = profiles.profile_shapes(manifest["graphs"][0])
if kind == "swap":
    graph, names = swap.constant_base(bundle, Path(sys.argv[4]))
    profiles = swap.swap_profiles(bundle, None)
else:
    names = () if bundle.mixed else install.refit_names(bundle.path, manifest)
network, parser = network.parse_graph(trt, builder, logger, graph)
marked = [name for name in names if network.mark_weights_refittable(name)]
for name in marked:
    network.unmark_weights_refittable(name)
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
profiles.add_profile(builder, network, config, logger, profiles)
plan = builder.build_serialized_network(network, config)
wrong = {name: {**p, "min": p["max"], "max": p["min"]} for name, p in profiles.items()}
try:
    profiles.add_profile(builder, network, config, logger, wrong)
    refused = ""
except ExportError as err:
    refused = str(err)
print(json.dumps({
    "layers": network.num_layers, "bytes": 0 if plan is None else plan.nbytes,
    "refit": len(names), "marked": len(marked), "refused": refused, "errors": logger.errors,
}))
"""

_REFUSE = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorrt_rtx_bindings as trt
from pathlib import Path
from mdpd_deploy.export.tensorrt import network
from mdpd_deploy.runtimes.tensorrt.library import recording_logger
logger = recording_logger(trt)
try:
    network.parse_graph(trt, trt.Builder(logger), logger, Path(sys.argv[2]))
except Exception as err:
    print(type(err).__name__, err)
"""


@pytest.fixture(scope="module")
def rtx():
    """The folder of the unpacked wheels, and the environment that finds their libraries."""
    path = Path(__file__).with_name("trt_api.py")
    spec = importlib.util.spec_from_file_location("trt_api", path)
    trt_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trt_api)
    libraries = trt_api.fetch("tensorrt-rtx-cu13-libs", VERSION) / "tensorrt_rtx_libs"
    bindings = trt_api.fetch("tensorrt-rtx-cu13-bindings", VERSION)
    searched = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return str(bindings), {"LD_LIBRARY_PATH": os.pathsep.join(searched)}


@pytest.fixture(scope="module")
def mixed_bundle(tiny_text_run, tmp_path_factory):
    """One run twice, under two names: a graph that takes `task_id`."""
    from mdpd_deploy.commands.export import export_runs

    options = dict(names=["a", "b"], fmt="trt", golden="synthetic", metric_gate=False)
    return export_runs([tiny_text_run.path] * 2, out=tmp_path_factory.mktemp("m") / "b", **options)


FIXTURES = {
    "text": "tiny_trt_bundle",
    "image": "tiny_bundle",
    "mixed": "mixed_bundle",
    "swap": "mixed_bundle",
}


@pytest.mark.parametrize("kind", FIXTURES)
def test_nvidias_builder_takes_the_exported_graphs(kind, rtx, request, run_python, tmp_path):
    bundle = request.getfixturevalue(FIXTURES[kind])
    bundle = getattr(bundle, "path", bundle)
    bindings, environment = rtx
    words = (bindings, str(bundle), kind, str(tmp_path))
    done = run_python("-W", "ignore", "-c", _BUILD, *words, **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 10_000 and found["layers"] > 50, found
    assert found["marked"] == found["refit"]
    assert found["refit"] > 8 or kind == "mixed"
    assert found["refused"].startswith("TensorRT refuses the shapes")


def test_nvidias_parser_names_what_it_refuses(rtx, tiny_trt_bundle, tmp_path, run_python):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(tiny_trt_bundle / "model.onnx")
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "plain.onnx")
    options = dict(weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "q.onnx", **options)
    bindings, environment = rtx
    words = ("-W", "ignore", "-c", _REFUSE, bindings, str(tmp_path / "q.onnx"))
    done = run_python(*words, **environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("ExportError TensorRT's parser refuses the graph:")
    assert "DynamicQuantizeLinear" in said[0] or "MatMulInteger" in said[0]
