"""A generated repository inside a real Triton server, where one can be had without a GPU.

NVIDIA's wheel `nvidia-pytriton` holds the server with its Python backend. MDPD_TRITON names a
virtual environment with it and with what the repository's README puts into the container:

    python3.11 -m venv triton && triton/bin/pip install nvidia-pytriton onnxruntime \\
        'numpy<2' omegaconf pillow pydantic safetensors tokenizers
    triton/bin/pip install --no-deps .
    MDPD_TRITON=triton pytest tests/test_triton_server.py

The wheel has no ONNX Runtime backend: `BACKEND` stands in for it. Everything else is Triton's own:
reading the configurations without auto-completion, warm-up, batching, reshaping, the ensemble, the
Python backend, the labels.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mdpd_deploy import triton_repository
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.manifest import Port
from mdpd_deploy.export.triton.config import Signature, TritonOptions, graph_config, to_pbtxt
from mdpd_deploy.runtimes.base import only

ENVIRONMENT = Path(os.environ.get("MDPD_TRITON", "/nonexistent")).resolve()
SITES = list(ENVIRONMENT.glob("lib/python3*/site-packages/pytriton/tritonserver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITES, reason="MDPD_TRITON names no environment with nvidia-pytriton"),
]
BACKEND = """
import json, os
import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        if os.path.isdir(path):
            path = os.path.join(path, "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        names = [port["name"] for port in self.config["input"]]
        given = [
            [triton.get_input_tensor_by_name(request, name).as_numpy() for name in names]
            for request in requests
        ]
        whole = dict(zip(names, map(np.concatenate, zip(*given))))
        print("RAN", self.config["name"], {n: a.shape for n, a in whole.items()}, flush=True)
        (found,) = self.session.run(None, whole)
        ends = np.cumsum([0, *(len(arrays[0]) for arrays in given)])
        name = self.config["output"][0]["name"]
        return [
            triton.InferenceResponse([triton.Tensor(name, found[start:end])])
            for start, end in zip(ends, ends[1:])
        ]
"""


def write_task_model(folder):
    """A graph with an int64 input of shape [batch], as one that answers several tasks has."""
    ports = [
        Port(name="x", dtype="float32", shape=["batch", 2]),
        Port(name="task_id", dtype="int64", shape=["batch"]),
    ]
    out = Port(name="y", dtype="float32", shape=["batch", 2])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "task_id"], ["row"]),
         helper.make_node("Add", ["x", "row"], ["y"])],
        "tasks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2]),
         helper.make_tensor_value_info("task_id", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor("table", TensorProto.FLOAT, [2, 2], [0, 10, 20, 30])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    profiles = {"min": {"x": (1, 2), "task_id": (1,)}, "max": {"x": (4, 2), "task_id": (4,)}}
    signature = Signature(ports, [out], profiles)
    config = graph_config("tasks", signature, "onnxruntime", TritonOptions(), labelled=False)
    (folder / "1").mkdir(parents=True)
    (folder / "warmup").mkdir()
    onnx.save(model, folder / "1" / "model.onnx")
    (folder / "config.pbtxt").write_text(to_pbtxt(config))
    (folder / "warmup" / "x-2").write_bytes(np.zeros(2, "<f4").tobytes())
    (folder / "warmup" / "task_id-1").write_bytes(np.ones(1, "<i8").tobytes())


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tiny_text_bundle):
    return {"digits": tiny_bundle, "films": tiny_text_bundle}


@pytest.fixture(scope="module")
def server(bundles, tmp_path_factory):
    """Start Triton on the repository; yield a client and the log."""
    import tritonclient.http as client

    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "repository"
    triton_repository({name: bundle.path for name, bundle in bundles.items()}, repository)
    write_task_model(repository / "tasks")
    (installed,) = SITES
    site = installed.parents[1]
    backends = folder / "backends"
    shutil.copytree(installed / "backends", backends)
    python = site.parent.name.removeprefix("python")
    stub = installed / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (backends / "python" / stub.name).chmod(0o755)
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(BACKEND)
    binary = folder / "tritonserver"
    shutil.copy(installed / "bin" / "tritonserver", binary)
    binary.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        str(binary), f"--model-repository={repository}", f"--backend-directory={backends}",
        "--disable-auto-complete-config", "--http-address=127.0.0.1", f"--http-port={port}",
        "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs"),
    }
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, cwd=folder)
    try:
        with client.InferenceServerClient(f"127.0.0.1:{port}") as opened:
            for _ in range(120):
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(Exception):
                    if opened.is_server_ready():
                        break
                time.sleep(0.5)
            assert opened.is_server_ready(), log.read_text()[-3000:]
            yield opened, log
    finally:
        process.terminate()
        process.wait(60)


def given(name, array, datatype):
    import tritonclient.http as client

    tensor = client.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


@pytest.mark.parametrize("name", ["digits", "films"])
def test_triton_answers_as_the_bundle(name, server, bundles):
    opened, _ = server
    golden = load_golden(bundles[name].path / "golden.safetensors")
    types = {"float32": "FP32", "int64": "INT64"}
    tensors = [given(n, a, types[str(a.dtype)]) for n, a in golden.arrays.items()]
    found = opened.infer(name, tensors).as_numpy("logits")
    np.testing.assert_allclose(found, only(golden.outputs), atol=1e-4)


@pytest.mark.parametrize("name", ["digits", "films"])
def test_the_ensemble_takes_raw_inputs(name, server, bundles):
    opened, _ = server
    golden = load_golden(bundles[name].path / "golden.safetensors")
    rows = [[_encode(raw)] for raw in golden.raws]
    raw = "text" if name == "films" else "image"
    tensor = given(raw, np.array(rows, dtype=object), "BYTES")
    found = opened.infer(f"{name}_ensemble", [tensor]).as_numpy("logits")
    np.testing.assert_allclose(found, only(golden.outputs), atol=1e-4)


def test_classes_have_their_names(server, bundles):
    import tritonclient.http as client

    opened, _ = server
    golden = load_golden(bundles["digits"].path / "golden.safetensors")
    wanted = client.InferRequestedOutput("logits", class_count=1)
    tensor = given("pixel_values", golden.arrays["pixel_values"], "FP32")
    found = opened.infer("digits", [tensor], outputs=[wanted]).as_numpy("logits")
    names = [row[0].decode().split(":")[2] for row in found]
    assert names == [bundles["digits"].label_names[i] for i in only(golden.outputs).argmax(1)]


def test_a_bad_picture_is_an_error_with_its_reason(server):
    import tritonclient.utils

    opened, _ = server
    tensor = given("image", np.array([[b"no picture"]], dtype=object), "BYTES")
    with pytest.raises(tritonclient.utils.InferenceServerException, match="readable JPEG"):
        opened.infer("digits_ensemble", [tensor])


def test_one_number_per_row_reaches_the_graph_as_a_vector(server):
    opened, log = server
    x = np.zeros((3, 2), np.float32)
    task = np.array([[1], [0], [1]], np.int64)
    found = opened.infer("tasks", [given("x", x, "FP32"), given("task_id", task, "INT64")])
    np.testing.assert_array_equal(found.as_numpy("y"), [[20, 30], [0, 10], [20, 30]])
    assert "RAN tasks {'x': (3, 2), 'task_id': (3,)}" in log.read_text()


def test_every_bound_was_warmed_up(server, bundles):
    _, log = server
    ran = log.read_text()
    longest = bundles["films"].graph()["shapes"]["sequence"]["max"]
    for batch in (1, 8, 32):
        assert f"RAN digits {{'pixel_values': ({batch}, 3, 16, 16)}}" in ran
    assert f"'input_ids': (32, {longest})" in ran


def _encode(raw):
    if isinstance(raw, str):
        return raw.encode()
    stream = io.BytesIO()
    raw.save(stream, format="PNG")
    return stream.getvalue()
