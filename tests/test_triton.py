"""Triton repositories: configurations against Triton's own message type, files that load and agree.

The Python-backend model is driven through a stand-in for `triton_python_backend_utils`, the module
that only exists inside Triton; tests/test_triton_server.py does the same inside a real server.
"""

import ast
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from PIL import Image

from mdpd_deploy import load_bundle, triton_repository
from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.manifest import Manifest, Port
from mdpd_deploy.artifacts.sealed import check_graphs, read_checked, seal
from mdpd_deploy.cli import main
from mdpd_deploy.errors import UserError
from mdpd_deploy.export.triton.config import (
    Signature,
    TritonOptions,
    graph_config,
    to_pbtxt,
)
from mdpd_deploy.export.triton.preprocess import MAX_BYTES, REQUIRED, TritonPreprocess
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.onnx import OnnxRunner

pytest.importorskip("onnxruntime", reason="exports and runs graphs")
protobuf = pytest.importorskip("google.protobuf.text_format", reason="reads config.pbtxt")
messages = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's own messages")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def image_bundle(tiny_bundle) -> Bundle:
    return tiny_bundle


@pytest.fixture(scope="module")
def text_bundle(tiny_text_bundle) -> Bundle:
    return tiny_text_bundle


@pytest.fixture(scope="module")
def repository(image_bundle, text_bundle, folder):
    bundles = {"digits": image_bundle.path, "films": text_bundle.path}
    triton_repository(bundles, folder / "repository", instances=2, queue=64)
    return folder / "repository"


def read_config(path):
    """Parse as Triton does: an unknown field or a wrong type raises."""
    return protobuf.Parse(path.read_text(), messages.ModelConfig())


def parse(config):
    return protobuf.Parse(to_pbtxt(config), messages.ModelConfig())


def name_of(data_type):
    return messages.DataType.Name(data_type)


@pytest.mark.parametrize("name", ["digits", "films"])
def test_the_configuration_is_the_manifests(name, repository, image_bundle, text_bundle):
    bundle = {"digits": image_bundle, "films": text_bundle}[name]
    manifest = Manifest.model_validate(bundle.manifest)
    config = read_config(repository / name / "config.pbtxt")
    assert (config.name, config.backend) == (name, "onnxruntime")
    assert config.max_batch_size == manifest.graph().shapes["batch"].max == 32
    types = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
    graph = manifest.graph()
    for given, ports in ((config.input, graph.inputs), (config.output, graph.outputs)):
        assert [port.name for port in given] == [port.name for port in ports]
        for found, port in zip(given, ports, strict=True):
            assert name_of(found.data_type) == types[port.dtype]
            assert list(found.dims) == [a if isinstance(a, int) else -1 for a in port.shape[1:]]
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 1_000_000)
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert not config.dynamic_batching.preferred_batch_size  # only with profiles for those sizes
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, messages.ModelInstanceGroup.KIND_CPU)
    assert config.version_policy.latest.num_versions == 1


def test_warm_up_runs_every_bound_with_valid_values(repository, text_bundle):
    config = read_config(repository / "films" / "config.pbtxt")
    shapes = text_bundle.graph()["shapes"]
    runner = OnnxRunner(repository / "films" / "1" / "model.onnx", threads=1)
    assert [sample.name for sample in config.model_warmup] == ["min", "opt", "max"]
    for sample in config.model_warmup:
        assert sample.batch_size == shapes["batch"][sample.name]
        arrays = {}
        for name, given in sample.inputs.items():
            assert list(given.dims) == [shapes["sequence"][sample.name]]
            raw = (repository / "films" / "warmup" / given.input_data_file).read_bytes()
            row = np.frombuffer(raw, dtype="<i8").reshape(given.dims)
            arrays[name] = np.repeat(row[None], sample.batch_size, axis=0)  # as Triton does
        assert arrays["attention_mask"].any(axis=1).all()
        assert np.isfinite(only(runner(arrays))).all()


@pytest.mark.parametrize("name", ["digits", "films"])
def test_the_graph_answers_from_the_repository(name, repository, image_bundle, text_bundle):
    bundle = {"digits": image_bundle, "films": text_bundle}[name]
    golden = load_golden(bundle.path / "golden.safetensors")
    found = only(OnnxRunner(repository / name / "1" / "model.onnx", threads=1)(golden.arrays))
    np.testing.assert_allclose(found, only(golden.outputs), atol=1e-4)


@pytest.mark.parametrize("name", ["digits", "films"])
def test_the_ensemble_hands_tensors_on_as_its_models_want_them(name, repository):
    both = read_config(repository / f"{name}_ensemble" / "config.pbtxt")
    steps = both.ensemble_scheduling.step
    assert both.platform == "ensemble"
    assert (repository / both.name / "1").is_dir()
    tensors = {port.name: (port.data_type, tuple(port.dims)) for port in both.input}
    for step in steps:
        model = read_config(repository / step.model_name / "config.pbtxt")
        assert model.max_batch_size == both.max_batch_size
        assert set(step.input_map) == {port.name for port in model.input}
        for port in model.input:
            assert tensors[step.input_map[port.name]] == (port.data_type, tuple(port.dims))
        for port in model.output:
            tensors[step.output_map[port.name]] = (port.data_type, tuple(port.dims))
    for port in both.output:
        assert tensors[port.name] == (port.data_type, tuple(port.dims))


def test_labels_are_the_classes_in_order(repository, image_bundle):
    for model in ("digits", "digits_ensemble"):
        (output,) = read_config(repository / model / "config.pbtxt").output
        lines = (repository / model / output.label_filename).read_text().splitlines()
        assert lines == list(image_bundle.label_names)


def test_an_input_of_one_number_per_row_is_reshaped():
    """A graph's int64 [batch] (the task of each row) is [batch, 1] to Triton's clients."""
    ids = Port(name="input_ids", dtype="int64", shape=["batch", "sequence"])
    task = Port(name="task_id", dtype="int64", shape=["batch"])
    out = Port(name="logits", dtype="float32", shape=["batch", 3])
    shapes = {"input_ids": (4, 7), "task_id": (4,)}
    signature = Signature([ids, task], [out], dict.fromkeys(("min", "opt", "max"), shapes))
    options = TritonOptions()
    graph = graph_config("m", signature, "onnxruntime", options, labelled=False)
    config = parse(graph)
    assert [list(port.dims) for port in config.input] == [[-1], [1]]
    assert [port.HasField("reshape") for port in config.input] == [False, True]
    assert list(config.input[1].reshape.shape) == []
    (warmup,) = config.model_warmup  # three equal profiles are one
    assert (warmup.batch_size, list(warmup.inputs["task_id"].dims)) == (4, [1])


def copy_of(bundle, folder):
    """A bundle to be changed, and the facts to seal it with."""
    shutil.copytree(bundle.path, folder)
    facts = {**bundle.manifest}
    for name in ("schema", "caches", "files"):
        del facts[name]
    return facts


@pytest.fixture(scope="module")
def mixed_bundle(tiny_text_run, folder) -> Bundle:
    from mdpd_deploy.export.multitask.bundle import write_bundle_of_tasks
    from mdpd_deploy.export.options import ExportOptions

    options = ExportOptions(metric_gate=False)
    return write_bundle_of_tasks(
        [tiny_text_run] * 2, folder / "mixed", options, names=["one", "two"]
    )


def test_a_bundle_of_several_tasks_takes_the_task_of_each_row(mixed_bundle, tmp_path):
    out = tmp_path / "repository"
    triton_repository({"mixed": mixed_bundle.path}, out)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["mixed"]
    config = read_config(out / "mixed" / "config.pbtxt")
    task = next(port for port in config.input if port.name == "task_id")
    assert (list(task.dims), task.HasField("reshape")) == ([1], True)
    assert not config.output[0].label_filename
    sample = config.model_warmup[0].inputs["task_id"].input_data_file
    assert (out / "mixed" / "warmup" / sample).read_bytes() == bytes(8)
    assert "| 1 | two | neg, pos |" in (out / "README.md").read_text()
    path = out / "mixed" / "1" / "model.onnx" / "model.onnx"  # its weights lie beside it
    golden = load_golden(mixed_bundle.tasks[1].golden)
    ids = np.ones(len(golden.raws), dtype=np.int64)
    found = only(OnnxRunner(path, threads=1)({**golden.arrays, "task_id": ids}))
    np.testing.assert_allclose(found[:, :2], only(golden.outputs), atol=1e-4)


def test_external_weights_make_the_model_a_folder(image_bundle, tmp_path):
    facts = copy_of(image_bundle, tmp_path / "big")
    proto = onnx.load(tmp_path / "big" / "model.onnx")
    onnx.save(
        proto, tmp_path / "big" / "model.onnx", save_as_external_data=True,
        location="model.onnx.data", size_threshold=1024,
    )  # fmt: skip
    seal(tmp_path / "big", facts)
    triton_repository({"big": tmp_path / "big"}, tmp_path / "repository")
    version = tmp_path / "repository" / "big" / "1"
    assert sorted(path.name for path in (version / "model.onnx").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]
    golden = load_golden(image_bundle.path / "golden.safetensors")
    found = only(OnnxRunner(version / "model.onnx" / "model.onnx", threads=1)(golden.arrays))
    np.testing.assert_allclose(found, only(golden.outputs), atol=1e-4)


def with_engine(bundle, folder, batches):
    """A bundle with an engine as `build-engine` leaves it, but for the plan's own bytes."""
    shutil.copytree(bundle.path, folder)
    shape = bundle.graph()["inputs"][0]["shape"][1:]
    profile = {bound: [n, *shape] for bound, n in zip(("min", "opt", "max"), batches, strict=True)}
    key = {"tensorrt": "10.13.3.9", "gpu": "NVIDIA H100", "compute_capability": "9.0"}
    (folder / "model.plan").write_bytes(b"plan")
    (folder / "model.plan.json").write_text(
        json.dumps({"key": {**key, "profiles": {"pixel_values": profile}}})
    )
    names = ("model.plan", "model.plan.json")
    plain = json.loads((folder / "manifest.json").read_text())
    from mdpd_deploy.files import sha256_file

    plain["caches"] = {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
    }
    (folder / "manifest.json").write_text(json.dumps(plain))
    return folder


def test_an_engine_is_served_in_the_shapes_it_was_built_for(image_bundle, tmp_path):
    bundle = with_engine(image_bundle, tmp_path / "b", (1, 4, 8))
    out = tmp_path / "repository"
    facts = triton_repository({"digits": bundle}, out)
    config = read_config(out / "digits" / "config.pbtxt")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 8)  # 32 would not load
    assert config.instance_group[0].kind == messages.ModelInstanceGroup.KIND_GPU
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4, 8]
    assert [path.name for path in (out / "digits" / "1").iterdir()] == ["model.plan"]
    assert read_config(out / "digits_ensemble" / "config.pbtxt").max_batch_size == 8
    assert facts["models"][0]["engine"]["tensorrt"] == "10.13.3.9"
    readme = (out / "README.md").read_text()
    assert "TensorRT 10.13.3.9" in readme
    assert "--gpus=all" in readme

    triton_repository({"digits": bundle}, tmp_path / "onnx", backend="onnxruntime")
    config = read_config(tmp_path / "onnx" / "digits" / "config.pbtxt")
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 32)
    with pytest.raises(UserError, match="engine runs on a GPU"):
        triton_repository({"digits": bundle}, tmp_path / "cpu", device="cpu")


def test_what_cannot_be_served_is_said(image_bundle, tmp_path):
    out, bundle = tmp_path / "repository", image_bundle.path
    with pytest.raises(UserError, match="holds no engine; build one on the GPU machine"):
        triton_repository({"digits": bundle}, out, backend="tensorrt")
    with pytest.raises(UserError, match="takes batches of 8 and more"):
        triton_repository({"digits": with_engine(image_bundle, tmp_path / "b", (8, 8, 8))}, out)
    with pytest.raises(UserError, match="'a/b' cannot name a model"):
        triton_repository({"a/b": bundle}, out)
    with pytest.raises(UserError, match="two models would be named a_ensemble"):
        triton_repository({"a": bundle, "a_ensemble": bundle}, out)
    assert not out.exists()


def test_only_a_repository_is_overwritten(repository, image_bundle, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    words = ["triton", f"m={image_bundle.path}", "--out"]
    assert main([*words, str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, str(tmp_path), "--overwrite"]) == 2
    assert (tmp_path / "mine.txt").exists()
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    assert main([*words, str(copy), "--overwrite", "--no-preprocess", "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == ["m"]
    assert sorted(path.name for path in copy.iterdir() if path.is_dir()) == ["m"]
    assert main([*words, str(tmp_path / "x"), "--backend", "tensorflow"]) == 2
    assert "onnxruntime, tensorrt" in capsys.readouterr().err


def test_the_readme_says_what_is_there(repository):
    text = (repository / "README.md").read_text()
    for word in ("`digits`", "`films_ensemble`", "opset 20", "--disable-auto-complete-config"):
        assert word in text
    snippet = text.split("```")[5]
    assert "triton.InferInput" in snippet
    compile(snippet, "README.md", "exec")


class Error(Exception):
    def message(self):
        return str(self)


STAND_IN = SimpleNamespace(  # the names of triton_python_backend_utils that we use
    get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
    Tensor=lambda name, array: (name, array),
    TritonError=Error,
    InferenceResponse=lambda output_tensors, error=None: (dict(output_tensors), error),
)


def preprocessor(repository, name):
    model = type("TritonPythonModel", (TritonPreprocess,), {"triton": STAND_IN})()
    model.initialize(
        {"model_repository": str(repository / f"{name}_preprocess"), "model_version": "1"}
    )
    return model


def objects(*rows):
    return np.array([list(row) for row in rows], dtype=object)


def test_pictures_become_the_graphs_input(repository, image_bundle):
    golden = load_golden(image_bundle.path / "golden.safetensors")
    encoded = []
    for picture in golden.raws:
        stream = io.BytesIO()
        picture.save(stream, format="PNG")
        encoded.append([stream.getvalue()])
    requests = [
        {"image": objects(encoded[0])},
        {"image": objects([b"no picture"])},
        {"image": objects([b"x" * (MAX_BYTES["image"] + 1)])},
        {"image": objects(*encoded[1:3])},
    ]
    first, bad, long, rest = preprocessor(repository, "digits").execute(requests)
    expected = golden.arrays["pixel_values"]
    np.testing.assert_array_equal(first[0]["pixel_values"], expected[:1])
    np.testing.assert_array_equal(rest[0]["pixel_values"], expected[1:3])
    assert "not a readable JPEG, PNG or WebP" in bad[1].message()
    assert "at most 16000000" in long[1].message()
    assert bad[0] == long[0] == {}
    assert rest[1] is None


def test_texts_that_wait_together_get_one_length(repository, text_bundle):
    runner = text_bundle.runner(threads=1)
    texts = ["good", "the film was very very good", "awful"]
    requests = [
        {"text": objects([texts[0].encode()])},
        {"text": objects([b"\xff"])},
        {"text": objects([b" "])},
        {"text": objects(*([text.encode()] for text in texts[1:]))},
    ]
    short, bad, empty, long = preprocessor(repository, "films").execute(requests)
    assert {array.shape[1] for array in (*short[0].values(), *long[0].values())} == {8}
    assert "not UTF-8" in bad[1].message() and "is empty" in empty[1].message()
    found = np.concatenate([only(runner(short[0])), only(runner(long[0]))])
    alone = np.concatenate([only(runner(text_bundle.preprocess([text]))) for text in texts])
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_a_picture_of_too_many_pixels_is_refused_from_its_header(repository):
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, format="PNG")
    (answer,) = preprocessor(repository, "digits").execute(
        [{"image": objects([stream.getvalue()])}]
    )
    assert "million pixels" in answer[1].message()


def test_the_python_model_needs_only_what_the_readme_installs(repository, run_python):
    """In the container mdpd-deploy comes without its dependencies."""
    names = {"pillow": "PIL"}
    path = repository / "films_preprocess" / "1" / "model.py"
    ours = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    code = f"""
import sys
before = set(sys.modules)
{chr(10).join(map(ast.unparse, ours))}
taken = {{name.partition(".")[0] for name in set(sys.modules) - before}}
import json
print(json.dumps(sorted(taken - set(sys.stdlib_module_names))))
"""
    taken = json.loads(run_python("-c", code).stdout)
    allowed = {names.get(name, name) for name in (word.partition("<")[0] for word in REQUIRED)}
    # what those packages need themselves
    allowed |= {
        "annotated_types",
        "pydantic_core",
        "typing_extensions",
        "typing_inspection",
        "yaml",
    }
    strangers = {name for name in taken if not name.startswith("_")} - allowed
    assert strangers <= {"mdpd_deploy", "attr", "cython_runtime"}


def test_a_changed_bundle_is_not_put_in(image_bundle, tmp_path):
    shutil.copytree(image_bundle.path, tmp_path / "b")
    _, manifest = read_checked(tmp_path / "b")
    check_graphs(tmp_path / "b", manifest)
    (tmp_path / "b" / "model.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match="not the file that was exported"):
        triton_repository({"b": tmp_path / "b"}, tmp_path / "out")
    assert load_bundle(image_bundle.path)
