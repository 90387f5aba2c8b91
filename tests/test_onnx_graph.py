"""One torch module → one ONNX graph: its axes, its cleanliness, its numbers, its signature."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mdpd_deploy.artifacts.certificate import of_each
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.checks.parity import compare_with_torch
from mdpd_deploy.checks.reference import shape_batches, torch_outputs
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import ExportError, UserError
from mdpd_deploy.graphs.signature import changed_weights, graph_signature, same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.machine import cpu_count, describe
from mdpd_deploy.model import Deployed, TaskModel
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.onnx import OnnxRunner, compute_nodes_on_cpu
from mdpd_deploy.tasks import Classify, Regress
from mdpd_deploy.tasks.head import Head

onnxruntime = pytest.importorskip("onnxruntime", reason="runs exported graphs")


@pytest.fixture(scope="module")
def backbone_of(tiny_vit, tiny_bert):
    def load(kind):
        folder = {"vit": tiny_vit, "bert": tiny_bert}[kind]
        return load_backbone(BackboneConfig(name=str(folder)), max_length=20)

    return load


def deployed(backbone, *, scale=None, tuned=True):
    torch.manual_seed(1)
    task = Regress(scale=scale) if scale else Classify.numbered(3)
    model = Deployed(backbone, task.new_head(backbone.width)).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    if tuned:
        with torch.no_grad():
            for parameter in backbone.norms().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def graphs(backbone_of, tmp_path_factory):
    made = {}
    for kind in ("vit", "bert"):
        model = deployed(backbone_of(kind))
        made[kind] = model, export_onnx(model, tmp_path_factory.mktemp(kind) / "model.onnx")
    return made


@pytest.fixture(params=["vit", "bert"])
def exported(request, graphs):
    return graphs[request.param]


def test_axes_and_names_are_the_declared_ones(exported):
    model, graph = exported
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    assert graph.input_names == model.backbone.input_names
    shapes = {item.name: item.shape for item in session.get_inputs()}
    if model.backbone.grid is None:
        assert shapes == {name: ["batch", "sequence"] for name in graph.input_names}
    else:
        assert shapes == {"pixel_values": ["batch", 3, 16, 16]}
    (output,) = session.get_outputs()
    assert (output.name, output.shape) == ("logits", ["batch", 3])


def test_graph_carries_nothing_of_the_machine_that_made_it(exported):
    _, graph = exported
    raw = graph.path.read_bytes()
    for trace in (
        b"/home/",
        str(Path(__file__).parents[1]).encode(),
        b"/tmp/",
        b".py",
        b"site-packages",
        b"stack",
    ):
        assert trace not in raw
    proto = onnx.load(graph.path)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert graph.nodes == len(proto.graph.node)


def test_numbers_are_torchs_at_every_shape(exported):
    model, graph = exported
    parity = compare_with_torch(model, OnnxRunner(graph.path), list(shape_batches(model)))
    assert parity.passed and parity.scaled_diff < 2e-5
    assert len(parity.cases) >= 3
    if model.backbone.grid is None:
        assert any("padded" in case.name for case in parity.cases)


def test_the_exporter_needs_no_second_attempt(exported):
    """Where this fails it starts again with Dynamo, and every export takes half as long again."""
    model, _ = exported
    inputs = model.backbone.example_inputs(2)
    ordered = tuple(inputs[name] for name in model.backbone.input_names)
    assert torch.export.export(model, ordered, strict=False).graph_signature.user_outputs


def test_parity_fails_when_one_norm_differs_a_little(exported, backbone_of):
    model, graph = exported
    other = deployed(backbone_of("bert" if model.backbone.grid is None else "vit"))
    name, parameter = next(iter(other.backbone.norms().items()))
    with torch.no_grad():
        parameter.mul_(1.05)
    parity = compare_with_torch(other, OnnxRunner(graph.path), list(shape_batches(other)))
    assert not parity.passed, name


def test_padding_does_not_change_real_rows(graphs):
    model, graph = graphs["bert"]
    runner = OnnxRunner(graph.path)
    short = model.backbone.preprocess(["a good film"])
    both = model.backbone.preprocess(["a good film", "the very very very bad film a a a"])
    np.testing.assert_allclose(only(runner(short))[0], only(runner(both))[0], atol=1e-5)


def test_inputs_are_bound_by_name_not_by_order(graphs):
    model, graph = graphs["bert"]
    runner = OnnxRunner(graph.path)
    arrays = model.backbone.preprocess(["a good film", "bad"])
    turned = dict(reversed(arrays.items()))
    np.testing.assert_allclose(only(runner(turned)), only(torch_outputs(model, arrays)), atol=1e-5)


class Twofold(TaskModel):
    """Gives what its head reads besides what it answers."""

    names = ("logits", "image_vector")

    @property
    def output_names(self):
        return self.names

    def forward(self, *inputs):
        vector = self.backbone(dict(zip(self.backbone.input_names, inputs, strict=True)))
        return self.head(vector), vector * 1000


@pytest.fixture
def twofold(backbone_of):
    backbone = backbone_of("vit")
    return Twofold(backbone, Head(backbone.width, 3)).eval()


def test_every_output_is_named_and_held_to_its_own_spread(twofold, tmp_path):
    graph = export_onnx(twofold, tmp_path / "model.onnx")
    runner, batches = OnnxRunner(graph.path), list(shape_batches(twofold))
    assert runner.output_names == graph.output_names == ("logits", "image_vector")
    parity = compare_with_torch(twofold, runner, batches)
    assert parity.passed and len(parity.cases) == 2 * len(batches)
    assert parity.to_json()["spread"].keys() == {"logits", "image_vector"}
    assert of_each(parity.to_json()["spread"], names=runner.output_names) == parity.spread

    def off(arrays):  # one part in a thousand of the small output, none of the large one's spread
        found = runner(arrays)
        return found | {"logits": found["logits"] + 1e-3 * parity.spread["logits"]}

    seen = compare_with_torch(twofold, off, batches)
    assert not seen.passed and seen.scaled_diff == pytest.approx(1e-3, rel=0.1)
    lacking = compare_with_torch(twofold, lambda a: {"logits": runner(a)["logits"]}, batches)
    assert not lacking.finite


@pytest.mark.parametrize("name", ["softmax", "Vector", "a-b"])
def test_an_output_is_not_called_as_an_operator(name, twofold, tmp_path):
    twofold.names = ("logits", name)
    with pytest.raises(ExportError, match=f"an output cannot be called '{name}'"):
        export_onnx(twofold, tmp_path / "model.onnx")


def test_an_output_that_is_called_as_another_value_is_refused(twofold, tmp_path):
    twofold.names = ("logits", "pixel_values")
    with pytest.raises(ExportError, match="two values of the graph are called 'pixel_values'"):
        export_onnx(twofold, tmp_path / "model.onnx")


def test_regression_graph_returns_scores_in_the_labels_unit(backbone_of, tmp_path):
    model = deployed(backbone_of("vit"), scale=(100.0, 15.0))
    graph = export_onnx(model, tmp_path / "model.onnx")
    arrays = {"pixel_values": np.random.default_rng(0).normal(size=(4, 3, 16, 16))}
    found = OnnxRunner(graph.path)({k: v.astype(np.float32) for k, v in arrays.items()})
    assert graph.output_names == ("scores",) and found["scores"].shape == (4, 1)
    assert 0 < np.abs(found["scores"] - 100).max() < 200


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_signature_sees_through_merged_initialisers(kind, graphs, backbone_of, tmp_path):
    tuned, graph = graphs[kind]
    a = graph.path
    bare = export_onnx(deployed(backbone_of(kind), tuned=False), tmp_path / "bare.onnx").path
    b = edit(bare, merge_equal_initialisers, tmp_path / "b.onnx")
    count = [len(onnx.load(path).graph.initializer) for path in (a, b)]
    assert count[0] > count[1], "the untuned norms' ones and zeros are equal"
    assert same_structure(a, b) == []
    expected = {f"backbone.{name}" for name in tuned.backbone.norms()}
    assert set(changed_weights(a, b)) == expected


def edit(path, change, target):
    proto = onnx.load(path)
    change(proto.graph)
    onnx.save(proto, target)
    return target


def merge_equal_initialisers(graph):
    """As the exporter does, and did with norms before they were given values of their own."""
    first, renamed = {}, {}
    for tensor in graph.initializer:
        kept = first.setdefault((tuple(tensor.dims), tensor.raw_data), tensor)
        renamed[tensor.name] = kept.name
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    kept = list(first.values())
    del graph.initializer[:]
    graph.initializer.extend(kept)


def change_epsilon(graph):
    node = next(node for node in graph.node if node.op_type == "LayerNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f *= 2


def change_operator(graph):
    next(node for node in graph.node if node.op_type == "Softmax").op_type = "LogSoftmax"


def swap_operands(graph):
    node = next(n for n in graph.node if n.op_type == "Div")
    first, second = node.input
    node.input[:] = [second, first]


def change_axis(graph):
    tensor = next(t for t in graph.initializer if t.data_type == onnx.TensorProto.INT64)
    values = onnx.numpy_helper.to_array(tensor) + 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("change", [change_epsilon, change_operator, swap_operands, change_axis])
def test_signature_notices_any_structural_change(change, graphs, tmp_path):
    path = graphs["bert"][1].path
    assert same_structure(path, path) == []
    assert same_structure(path, edit(path, change, tmp_path / "edited.onnx"))


def test_large_weights_go_to_a_file_beside(graphs, tmp_path):
    model, inside = graphs["vit"]
    outside = export_onnx(model, tmp_path / "model.onnx", external_above_bytes=1000)
    assert (tmp_path / "model.onnx.data").is_file()
    assert not inside.path.with_name("model.onnx.data").exists()
    assert OnnxRunner(outside.path).input_names == ("pixel_values",)
    assert same_structure(inside.path, outside.path) == []
    assert changed_weights(inside.path, outside.path) == []
    assert len(graph_signature(outside.path).nodes) == outside.nodes


def test_two_exports_are_byte_equal(graphs, tmp_path):
    model, first = graphs["vit"]
    second = export_onnx(model, tmp_path / "again.onnx")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_only_an_fp32_model_is_exported(backbone_of, tmp_path):
    model = deployed(backbone_of("vit")).bfloat16()
    with pytest.raises(ExportError, match="FP32"):
        export_onnx(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_cuda_is_refused_where_it_is_missing(exported):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    with pytest.raises(UserError, match=r"--device cuda.*--device cpu"):
        OnnxRunner(exported[1].path, device="cuda")
    with pytest.raises(UserError, match="choose one of cpu, cuda"):
        OnnxRunner(exported[1].path, device="tpu")


def test_a_compute_node_on_the_cpu_is_seen(exported):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(exported[1].path), options, providers=["CPUExecutionProvider"]
    )
    assert len(compute_nodes_on_cpu(session)) >= 10


def test_a_broken_graph_is_a_user_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"model\.onnx is not a graph"):
        OnnxRunner(path)


def test_a_nan_is_never_within_tolerance(exported):
    model, graph = exported
    parity = compare_with_torch(model, OnnxRunner(graph.path), list(shape_batches(model)))
    broken = replace(parity.cases[0], finite=False)
    assert not replace(parity, cases=(broken, *parity.cases[1:])).passed


def test_machine_is_described_in_plain_json(monkeypatch, tmp_path):
    facts = json.loads(json.dumps(describe()))
    assert facts["cores"] == cpu_count() >= 1
    assert facts["versions"]["onnx"] == onnx.__version__
    assert facts["memory_bytes"] > 1e8
    monkeypatch.setattr("mdpd_deploy.machine.CGROUPS", tmp_path)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert cpu_count() == 1
