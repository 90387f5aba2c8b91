"""Exports in other precisions than FP32: forms, receipts, gates, refusals, and what `auto` keeps."""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdpd_deploy import bench_latency, export_run, load_bundle
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.checks.metric import prove_converted as prove_metric
from mdpd_deploy.checks.parity import prove as prove_parity_fp32
from mdpd_deploy.checks.parity import prove_converted as prove_parity
from mdpd_deploy.checks.policy import POLICIES, agreement, paired_drop
from mdpd_deploy.checks.reference import Measured, Reference, torch_outputs
from mdpd_deploy.cli import main
from mdpd_deploy.commands.evaluate import evaluate_bundle
from mdpd_deploy.errors import ExportError, UserError, VerificationError, WorkFailed
from mdpd_deploy.export.fade import fade
from mdpd_deploy.export.options import ExportOptions
from mdpd_deploy.export.precision.autocast import autocast
from mdpd_deploy.export.precision.bf16_twin import write_twin
from mdpd_deploy.export.precision.checks import check_converted
from mdpd_deploy.export.precision.convert import convert, unconverted
from mdpd_deploy.export.precision.forms import form_of, forms_for, place_of
from mdpd_deploy.export.precision.int8_trt import check_symmetric
from mdpd_deploy.export.precision.material import Calibration, Material, material_of
from mdpd_deploy.export.precision.trials import Race, choose, try_all
from mdpd_deploy.export.precision.weight_report import require_met, weight_report
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.serve.latency.graph_race import GraphTiming

pytest.importorskip("onnxruntime", reason="converts and runs graphs")

IN_ONNX = [form for form in forms_for("cpu") if form.runtime == "onnx"]
ON_A_CPU = ["fp32", "fp16", "int8-cpu", "fp32 in OpenVINO", "bf16 in OpenVINO", "int8-openvino"]
BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


@pytest.fixture(scope="session")
def fp32(tiny_bundle):
    return tiny_bundle


@pytest.fixture(scope="session")
def int8_cpu(tiny_text_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("p") / "int8-cpu"
    return export_run(tiny_text_run.path, precision="int8-cpu", out=out)


@pytest.fixture(scope="session")
def int8_trt(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("p") / "int8-trt"
    return export_run(tiny_run.path, precision="int8-trt", fmt="trt", parity="warn", out=out)


@pytest.fixture(scope="session")
def bf16_file(fp32, tmp_path_factory):
    """The FP32 graph with every value in bfloat16 but inputs and outputs, by hand."""
    path = tmp_path_factory.mktemp("p") / "bf16.onnx"
    proto = onnx.load(fp32.path / "model.onnx")
    graph = proto.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(BFLOAT16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (given,), (out,) = graph.input, graph.output
    for node in graph.node:
        node.input[:] = ["low" if name == given.name else name for name in node.input]
        node.output[:] = ["high" if name == out.name else name for name in node.output]
    graph.node.insert(0, helper.make_node("Cast", [given.name], ["low"], to=TensorProto.BFLOAT16))
    graph.node.append(helper.make_node("Cast", ["high"], [out.name], to=TensorProto.FLOAT))
    proto.opset_import[0].version = 22
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="session")
def reference(tiny_run, fp32):
    """PyTorch's side of the gates of the tiny image run."""
    metrics = tiny_run.summary["metrics"]["deployed"]
    measured = Measured(tiny_run.load_evaluation()["validation"], tuple(metrics), metrics, 8)
    golden = fp32.golden()
    return Reference(fade(tiny_run).model, tiny_run.preprocess, golden, measured)


@pytest.fixture(scope="session")
def fp16(fp32, reference, tmp_path_factory):
    """The FP32 graph converted for the CPU, through its gates."""
    path = tmp_path_factory.mktemp("p") / "fp16.onnx"
    form, source = form_of("fp16", "cpu"), fp32.path / "model.onnx"
    words = dict(material=material(fp32), reference=reference, mode="fail")
    return convert(form, source, path, **words)


def graph_of(bundle):
    return onnx.load(bundle.path / "model.onnx")


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


# --- what is in the files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8_cpu", "int8_trt"])
def test_the_receipt_is_what_the_file_holds(name, request):
    bundle = request.getfixturevalue(name)
    receipt = bundle.manifest["receipt"]
    assert receipt["weight_bytes"] == weight_bytes(graph_of(bundle))
    assert receipt["asked"] == "int8" and receipt["met"] and receipt["weights_share"] >= 0.9
    assert receipt == json.loads((bundle.path / "parity.json").read_text())["receipt"]
    assert bundle.graph()["nodes"] == len(graph_of(bundle).graph.node)


def weight_bytes(proto):
    held = Counter()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        held[str(array.dtype)] += array.nbytes
    return dict(held)


def test_int8_for_the_cpu_is_dynamic_and_standard(int8_cpu):
    proto = graph_of(int8_cpu)
    found = operators(proto)
    assert found["MatMulInteger"] and found["DynamicQuantizeLinear"]
    assert {entry.domain for entry in proto.opset_import} == {""}
    islands = Counter(name.split()[0] for name in int8_cpu.manifest["receipt"]["fp32_islands"])
    blocks = found["Softmax"]
    assert islands["MatMul"] == 2 * blocks == found["MatMul"], "only attention's own products"
    assert int8_cpu.manifest["receipt"]["compute_nodes"]["int8"] == found["MatMulInteger"]


def test_int8_for_tensorrt_is_symmetric_only(int8_trt):
    proto = graph_of(int8_trt)
    found = operators(proto)
    assert not {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"} & set(found)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    pairs = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = weights[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    matrices = [n for n in pairs if weights.get(n.input[0], np.zeros(1)).ndim > 1]
    assert matrices and all(weights[n.input[1]].size > 1 for n in matrices), "per channel"
    products = found["MatMul"] + found["Gemm"] + found["Conv"]
    assert int8_trt.manifest["receipt"]["compute_nodes"]["int8"] == products - 2 * found["Softmax"]
    assert int8_trt.manifest["conversion"].endswith("ranges from 36 training inputs")
    assert json.loads((int8_trt.path / "build_engine.json").read_text())["precision"] == "int8-trt"


def test_what_was_proved_before_conversion_says_so(int8_trt, fp32):
    verification = int8_trt.manifest["verification"]
    for gate in ("side_free", "identity"):
        assert verification[gate]["note"].endswith("proved on the FP32 graph before conversion")
    details = json.loads((int8_trt.path / "parity.json").read_text())
    assert details["before_conversion"]["parity"]["scaled_diff"] < 1e-4
    assert details["parity"]["tolerance"] is None and details["parity"]["scaled_diff"] > 1e-4
    assert details["policy"]["mode"] == "warn" == int8_trt.manifest["parity"]
    assert fp32.manifest["parity"] == "fail" and fp32.manifest["receipt"]["met"]


def test_fp16_on_the_cpu_is_half_the_file_and_within_its_policy(fp16, fp32):
    assert fp16.graph.stat().st_size < 0.6 * (fp32.path / "model.onnx").stat().st_size
    assert fp16.report.weight_bytes == weight_bytes(onnx.load(fp16.graph))
    assert set(fp16.report.compute_nodes) == {"float16"} and not fp16.report.fp32_islands
    assert [seen.verdict for seen in fp16.gates.values()] == ["passed"] * 3
    parity = fp16.gates["parity"].details
    assert 1e-6 < parity["scaled_diff"] < parity["tolerance"] == 3e-2


# --- bundles are used like any other -------------------------------------------------------------


def test_a_reduced_bundle_predicts_evaluates_and_is_timed(int8_cpu, sentence_folder, tmp_path):
    bundle = load_bundle(int8_cpu.path)
    (prediction,) = bundle.predict(["a good film"])
    assert prediction.label in ("neg", "pos")
    found = evaluate_bundle(bundle.path, str(sentence_folder), batch=32, device="cpu")
    details = json.loads((bundle.path / "parity.json").read_text())
    assert found.examples["validation"] == details["metric"]["examples"]
    report = bench_latency(bundle.path, batch=[1], seconds=0.05, out=tmp_path / "latency")
    assert {row["precision"] for row in report["rows"]} == {"int8-cpu"}
    assert {row["variant"] for row in report["rows"]} >= {"deployed", "bare"}


def test_fp16_gives_the_bare_backbone_in_its_own_precision(fp16, fp32, tmp_path):
    folder = shutil.copytree(fp32.path, tmp_path / "b")
    shutil.copyfile(fp16.graph, folder / "model.onnx")
    raw = (folder / "model.onnx").read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    listed = fp32.manifest | {"files": fp32.manifest["files"] | {"model.onnx": entry}}
    changed = replace(fp32, path=folder, manifest=listed)
    bare = onnx.load(changed.write_bare_graph(tmp_path / "bare.onnx"))
    onnx.checker.check_model(bare, full_check=True)
    kinds = {t.data_type for t in bare.graph.initializer}
    assert TensorProto.FLOAT not in kinds and TensorProto.FLOAT16 in kinds


def interpreter(path, *lines):
    """A program that stands in the interpreter's place."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_bf16_through_autocasts_protocol_is_held_to_its_gates_and_not_run(
    tiny_run, bf16_file, digit_folder, tmp_path, monkeypatch, capsys
):
    said = tmp_path / "words"
    python = interpreter(
        tmp_path / "python",
        f'for word; do echo "$word" >> {said}; done',
        f'cp {bf16_file} "$6"',  # -m MODULE --onnx_path IN --output_path OUT …
    )
    monkeypatch.setenv("MDPD_AUTOCAST_PYTHON", str(python))
    out = tmp_path / "bf16"
    words = ["export", tiny_run.path, "--precision", "bf16", "--target", "gpu", "--out", out]
    assert main([*map(str, words)]) == 0
    assert "(ModelOpt AutoCast, ranges from golden inputs" in capsys.readouterr().out
    given = said.read_text().splitlines()
    assert given[:3] == ["-m", "modelopt.onnx.autocast", "--onnx_path"]
    assert {"--keep_io_types", "--calibration_data"} < set(given)
    assert given[given.index("--low_precision_type") + 1] == "bf16"
    assert given[given.index("--providers") + 1] == "cpu"
    bundle = load_bundle(out)
    assert bundle.manifest["precision"] == "bf16" and bundle.graph()["opset"] == 22
    assert set(bundle.manifest["receipt"]["compute_nodes"]) == {"bfloat16"}
    assert "float32 twin" in bundle.manifest["verification"]["parity"]["note"]
    drift = json.loads((out / "parity.json").read_text())["parity"]["scaled_diff"]
    assert 1e-4 < drift < 3e-2
    assert main(["predict", str(out), str(next(digit_folder.rglob("*.png")))]) == 2
    assert "no bfloat16 kernels" in capsys.readouterr().err


def test_the_twin_rounds_every_value(tmp_path):
    def value(name, kind):
        return helper.make_tensor_value_info(name, kind, ["n"])

    weight = np.array([1.0078125], dtype=BFLOAT16)  # 1 + 2^-7, the smallest step above 1
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["low", "w"], ["once"]),
        helper.make_node("Mul", ["once", "w"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT)], [value("y", TensorProto.FLOAT)],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "bf16.onnx")
    x = np.linspace(-3, 3, 101, dtype=np.float32)
    twin = OnnxRunner(write_twin(tmp_path / "bf16.onnx", tmp_path / "twin.onnx"))
    expected = (x.astype(BFLOAT16) * weight * weight).astype(np.float32)
    np.testing.assert_array_equal(twin({"x": x})["y"], expected)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8-trt"}, "int8-trt --target cpu: .* slower than fp32"),
        ({"precision": "int8-cpu", "fmt": "trt"}, "int8-cpu --fmt trt: TensorRT refuses"),
        ({"precision": "int8"}, "one int8 file cannot serve all: name int8-cpu"),
        (
            {"precision": "int8-openvino", "fmt": "trt"},
            "OpenVINO runs on the CPU here; use int8-trt",
        ),
        ({"precision": "fp8", "fmt": "trt"}, "--precision fp8: no CPU runs it"),
        ({"precision": "fp61"}, "unknown 'fp61'. Did you mean 'fp16'"),
        ({"target": "tpu"}, "--target: unknown 'tpu'"),
        ({"fmt": "trt", "target": "cpu"}, "--fmt trt runs on a GPU"),
        ({"fmt": "onnx", "target": "gpu"}, "--target gpu is served by TensorRT"),
        (
            {"precision": "auto", "target": "gpu"},
            "none can be built here: .*fp16 is the usual choice",
        ),
        ({"precision": "auto", "seconds": 0}, "--seconds 0"),
        ({"seconds": 1}, "--seconds belongs to --precision auto"),
        ({"precision": "int8-cpu", "converted": "a.onnx"}, "--converted belongs to fp16 and bf16"),
        ({"precision": "auto", "converted": "a.onnx"}, "--converted belongs to one precision"),
        ({"parity": "ignore"}, "--parity: unknown 'ignore'"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(options, words, tiny_run, tmp_path):
    with pytest.raises(UserError, match=words):
        export_run(tiny_run.path, out=tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_format_and_target_follow_from_each_other():
    assert (
        place_of(None, None) == place_of("onnx", None) == place_of(None, "cpu") == ("onnx", "cpu")
    )
    assert (
        place_of("trt", None) == place_of(None, "gpu") == place_of("trt", "gpu") == ("trt", "gpu")
    )
    assert [f.name for f in forms_for("cpu")] == ON_A_CPU
    assert [f.name for f in IN_ONNX] == ["fp32", "fp16", "int8-cpu"]
    assert [f.precision for f in forms_for("gpu")] == ["fp32", "fp16", "bf16", "int8-trt"]


def test_calibration_needs_the_tasks_own_data(tiny_run, fp32, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.path, run, ignore=shutil.ignore_patterns("bundles", "checkpoints"))
    config = (run / "config.yaml").read_text()
    home = tiny_run.config.data.path
    (run / "config.yaml").write_text(config.replace(home, str(tmp_path / "gone")))
    golden = load_golden(fp32.path / "golden.safetensors")
    told = material_of(Run.open(run), golden, ExportOptions(golden="synthetic"))
    with pytest.raises(UserError, match=r"calibrated on the run's training inputs.*gone"):
        told.calibration()


# --- gates and checks on damaged graphs ----------------------------------------------------------


def damaged(source, target, change):
    """Write a graph whose head has other weights, and open it."""
    proto = onnx.load(source)
    (head,) = (n for n in proto.graph.node if n.op_type == "Gemm")
    tensor = next(t for t in proto.graph.initializer if t.name == head.input[1])
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), tensor.name))
    onnx.save(proto, target)
    return OnnxRunner(target)


def test_fp16_parity_fails_on_a_damaged_graph_and_warns_only_when_asked(fp16, reference, tmp_path):
    policy = POLICIES["fp16"]
    runner = damaged(fp16.graph, tmp_path / "m.onnx", lambda w: w * 1.5)
    with pytest.raises(VerificationError, match=r"parity: largest difference .* allowed 3e-02"):
        prove_parity(reference, runner, policy, mode="fail")
    gate, parity = prove_parity(reference, runner, policy, mode="warn")
    assert gate.verdict == "warned" and not parity.passed and "--parity warn" in gate.note


def test_fp32_warns_only_when_asked(fp32, reference, tmp_path):
    runner = damaged(fp32.path / "model.onnx", tmp_path / "m.onnx", lambda w: w * 1.01)
    with pytest.raises(VerificationError, match=r"parity: outputs differ .* allowed 1e-04"):
        prove_parity_fp32(reference, runner)
    gate, parity = prove_parity_fp32(reference, runner, mode="warn")
    assert gate.verdict == "warned" and not parity.passed and "--parity warn" in gate.note


def test_int8_is_held_to_its_predictions(int8_trt, reference, tmp_path):
    """Its difference is only reported; a graph that answers at random must fail all the same."""
    path = int8_trt.path / "model.onnx"
    policy = POLICIES["int8-trt"]
    proto = onnx.load(path)
    last = next(n for n in reversed(proto.graph.node) if n.op_type == "Gemm")
    bias = next(t for t in proto.graph.initializer if t.name == last.input[2])
    values = numpy_helper.to_array(bias).copy()
    values += 50 * np.arange(len(values), dtype=np.float32)  # one class always wins
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(proto, tmp_path / "m.onnx")
    runner = OnnxRunner(tmp_path / "m.onnx")
    with pytest.raises(VerificationError, match="golden inputs change"):
        prove_parity(reference, runner, policy, mode="fail")
    _, parity = prove_parity(reference, runner, policy, mode="warn")
    with pytest.raises(VerificationError, match="clear predictions change"):
        prove_metric(reference, runner, policy, parity, mode="fail")


def test_outputs_that_are_not_finite_fail_even_with_a_warning(fp16, reference, tmp_path):
    runner = damaged(fp16.graph, tmp_path / "m.onnx", lambda w: w * np.nan)
    with pytest.raises(VerificationError, match="not finite"):
        prove_parity(reference, runner, POLICIES["fp16"], mode="warn")


def test_a_metric_that_drops_fails_with_its_interval(reference):
    labels = reference.measured.split.labels
    wrong = reference.beside(lambda arrays: answers_like(reference, arrays))[0].copy()
    wrong[np.arange(len(labels)), labels] = wrong.min() - 1  # never the right class
    rows = iter(wrong)

    def answers(arrays):
        return {"logits": np.stack([next(rows) for _ in range(len(arrays["pixel_values"]))])}

    _, parity = prove_parity(
        reference, lambda arrays: answers_like(reference, arrays), POLICIES["fp16"], mode="fail"
    )
    with pytest.raises(VerificationError, match=r"accuracy drops by [\d.]+ points \[.*, allowed"):
        prove_metric(reference, answers, POLICIES["fp16"], parity, mode="fail")


def answers_like(reference, arrays):
    return torch_outputs(reference.model, arrays)


def test_an_unconverted_graph_does_not_pass_for_another_precision(fp32):
    report = weight_report(fp32.path / "model.onnx", "float16")
    assert not report.met and report.weights_share == 0
    assert len(report.fp32_islands) == report.compute_nodes["float32"]
    with pytest.raises(ExportError, match=r"--precision fp16: only 0% .* became float16"):
        require_met(report, "fp16")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("zero point", "not symmetric int8"),
        ("uint8", "not symmetric int8"),
        ("scale", "not a positive number"),
        ("per tensor", "not per channel"),
        ("dynamic", "DynamicQuantizeLinear, which TensorRT refuses"),
        ("nothing", "nothing in the graph is quantised"),
    ],
)
def test_only_symmetric_pairs_pass_for_tensorrt(damage, words, int8_trt, int8_cpu, fp32):
    proto = graph_of({"dynamic": int8_cpu, "nothing": fp32}.get(damage, int8_trt))
    tensors = {t.name: t for t in proto.graph.initializer}
    if damage not in ("dynamic", "nothing"):
        dequantise = next(
            n for n in proto.graph.node
            if n.op_type == "DequantizeLinear" and len(getattr(tensors.get(n.input[0]), "dims", ())) == 2
        )  # fmt: skip
        scale, zero = (numpy_helper.to_array(tensors[name]) for name in dequantise.input[1:3])
        changed = {
            "zero point": (2, zero + np.int8(1)),
            "uint8": (2, zero.astype(np.uint8)),
            "scale": (1, -scale),
            "per tensor": (1, scale[:1]),
        }[damage]
        name = dequantise.input[changed[0]]
        tensors[name].CopyFrom(numpy_helper.from_array(changed[1], name))
    with pytest.raises(ExportError, match=words):
        check_symmetric(proto)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("weight", "is none of the exported model's"),
        ("input", "has other inputs than|not a sound"),
        ("output type", "has other outputs than|not a sound"),
        ("domain", "outside the ONNX standard|not a sound"),
        ("bytes", "not a sound ONNX graph"),
    ],
)
def test_a_file_that_is_not_ours_converted_is_refused(damage, words, fp16, fp32, tmp_path):
    proto = onnx.load(fp16.graph)
    if damage == "weight":
        tensor = next(t for t in proto.graph.initializer if len(t.dims) == 2)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values[:, ::-1].copy(), tensor.name))
    elif damage == "input":
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 24
    elif damage == "output type":
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    elif damage == "domain":
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        proto.graph.node[-1].domain = "com.microsoft"
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08not a graph" if damage == "bytes" else proto.SerializeToString())
    with pytest.raises(ExportError, match=words):
        check_converted(fp32.path / "model.onnx", path, "fp16")
    check_converted(fp32.path / "model.onnx", fp16.graph, "fp16")


# --- the policy's arithmetic ---------------------------------------------------------------------


def test_agreement_counts_only_what_the_drift_leaves_clear():
    before = np.array([[0, 1.0], [0, 0.3], [2, 0], [0, 5]], dtype=np.float32)
    after = np.array([[1.0, 0], [0.3, 0], [2, 0], [0, 5]], dtype=np.float32)
    found = agreement(before, after, 0.2)
    assert (found.rows, found.same, found.all_rows, found.all_same) == (3, 2, 4, 2)
    assert found.share == pytest.approx(2 / 3)
    assert agreement(before, after, 10.0).share == 1.0
    scores = np.array([[1.0], [2.0]], dtype=np.float32)
    assert agreement(scores, scores + np.float32([[0.1], [0.5]]), 0.2).share == 0.5


def test_the_drop_is_paired_and_has_the_sign_of_a_loss():
    labels = np.arange(200) % 2
    right = np.eye(2, dtype=np.float32)[labels]
    worse = right.copy()
    worse[:10] = worse[:10, ::-1]
    drop = paired_drop("accuracy", right, worse, labels)
    assert drop.value == pytest.approx(0.05)
    spread = 1.96 * np.sqrt(0.05 * 0.95 / 200)  # of a binomial share
    assert drop.low == pytest.approx(0.05 - spread, abs=0.01)
    assert drop.high == pytest.approx(0.05 + spread, abs=0.01)
    assert paired_drop("accuracy", worse, worse, labels).high == 0
    scores = np.linspace(0, 9, 50)
    exact, off = scores[:, None].astype(np.float32), (scores[:, None] + 1).astype(np.float32)
    error = paired_drop("mae", exact, off, scores)
    assert error.value == pytest.approx(1 / scores.std(), rel=1e-3), (
        "in units of the labels' spread"
    )


# --- AutoCast: the protocol with another interpreter ---------------------------------------------


def material(fp32, python=None, converted=None):
    golden = load_golden(fp32.path / "golden.safetensors")

    def never():
        raise AssertionError("AutoCast takes the golden inputs")

    return Material(Calibration("golden inputs", [golden.arrays]), never, python, converted)


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        (None, UserError, "cannot be run"),
        (["echo 'x: No module named modelopt' >&2", "exit 1"], UserError, "ModelOpt cannot be imp"),
        (["echo one >&2", "echo 'ValueError: bad shape' >&2", "exit 1"], ExportError, "bad shape"),
        (["exit 3"], ExportError, "it said nothing"),
        (["exit 0"], ExportError, "wrote no file"),
    ],
)
def test_autocast_says_what_went_wrong(lines, error, words, fp32, tmp_path):
    python = tmp_path / "python"
    if lines is not None:
        interpreter(python, *lines)
    source, target = fp32.path / "model.onnx", tmp_path / "m.onnx"
    with pytest.raises(error, match=words):
        autocast("fp16", source, target, material(fp32, python))
    with pytest.raises(UserError, match="--autocast-python or MDPD_AUTOCAST_PYTHON"):
        autocast("fp16", source, target, material(fp32))
    with pytest.raises(UserError, match=r"--converted .* is not a file"):
        autocast("fp16", source, target, material(fp32, converted=tmp_path / "none.onnx"))


def test_a_converted_file_is_taken_as_it_is(fp32, fp16, tmp_path):
    source, target = fp32.path / "model.onnx", tmp_path / "m.onnx"
    assert autocast("fp16", source, target, material(fp32, converted=fp16.graph)) == (
        "converted elsewhere"
    )
    assert target.read_bytes() == fp16.graph.read_bytes()


@pytest.mark.skipif(
    not os.environ.get("MDPD_AUTOCAST_PYTHON"), reason="MDPD_AUTOCAST_PYTHON names no interpreter"
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_autocast_for_real(precision, tiny_run, tmp_path):
    python = os.environ["MDPD_AUTOCAST_PYTHON"]
    bundle = export_run(
        tiny_run.path, fmt="trt", precision=precision, autocast_python=python, out=tmp_path / "b"
    )
    assert bundle.manifest["receipt"]["met"]


# --- auto ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unwarmed")
def test_auto_tries_what_is_valid_and_keeps_by_measurement(tiny_run, tmp_path, capsys):
    pytest.importorskip("openvino", reason="is raced too")
    out = tmp_path / "b"
    words = ["export", tiny_run.path, "--precision", "auto", "--seconds", "0.05", "--out", out]
    assert main([*map(str, words), "--target", "cpu", "--parity", "warn"]) == 0
    manifest = load_bundle(out).manifest
    tried = manifest["precision_trials"]
    assert [row["name"] for row in tried["trials"]] == ON_A_CPU
    (kept,) = [row for row in tried["trials"] if row["name"] == tried["chosen"]]
    assert (manifest["precision"], manifest["runtime"]) == (kept["precision"], kept["runtime"])
    for row in tried["trials"]:
        low, high = row["ci95"]
        assert 0 < low <= row["ratio"] <= high
    passed = [r for r in tried["trials"] if r["verdict"] == "passed"]
    best = [r for r in passed if r["timing"] == "faster"]
    expected = min(best, key=lambda r: r["ratio"])["name"] if best else "fp32"
    assert tried["chosen"] == expected
    shown = capsys.readouterr().out
    assert tried["recommendation"] in " ".join(shown.split()) and "time / fp32" in shown
    assert tried["settings"]["batch"] == 1 and tried["settings"]["rounds"] >= 10


def test_auto_keeps_fp32_unless_another_is_really_faster():
    class Timed:
        def __init__(self, median, verdict):
            self.median, self.verdict = median, verdict

    base = Timed(1.0, "control")
    assert choose("fp32", {"fp32": base, "fp16": Timed(0.9, "cannot-tell")}) == "fp32"
    both = {"fp32": base, "fp16": Timed(0.8, "faster"), "int8-cpu": Timed(0.5, "faster")}
    assert choose("fp32", both) == "int8-cpu"
    assert choose("fp32", both, barred=["int8-cpu"]) == "fp16"
    assert choose("fp32", both, barred=["int8-cpu", "fp16"]) == "fp32"


@pytest.mark.parametrize("missed", ["parity", "metric"])
def test_auto_does_not_keep_what_only_warned(fp32, fp16, missed):
    """It is the fastest by far, and stays a row of the table."""
    graph = fp32.path / "model.onnx"

    def make(form):
        if form.precision == "fp32":
            return unconverted(form, graph)
        gates = fp16.gates
        if form.precision == "int8-cpu":
            gates = gates | {missed: replace(gates[missed], verdict="warned")}
        return replace(fp16, form=form, gates=gates)

    def time_graphs(graphs):
        faster = {"fp16": 0.9, "int8-cpu": 0.3}
        found = {
            name: GraphTiming(ratio, (ratio, ratio), 2.0, "faster", "faster")
            for name, ratio in faster.items()
        }
        base = GraphTiming(1.0, (0.9, 1.1), 2.0, "control", "control")
        return Race({"fp32": base} | {n: found[n] for n in graphs if n in found}, {"batch": 1})

    forms = IN_ONNX
    tried = try_all(forms, make, time_graphs)
    assert tried.chosen.form.precision == "fp16"
    row = tried.table["trials"][2]
    assert (row["verdict"], row["ratio"]) == ("warned", 0.3)
    told = tried.table["recommendation"]
    assert told.startswith("fp16 is kept: the fastest that passes its gates, 0.90")
    assert told.endswith("; int8-cpu missed a gate and cannot be chosen")
    unclear = {"fp32": (1.0, "control"), "fp16": (1.0, "cannot-tell")}
    blurred = Race(
        {
            n: GraphTiming(ratio, (0.9, 1.1), 2.0, code, code)
            for n, (ratio, code) in unclear.items()
        },
        {"batch": 1},
    )
    said = try_all(forms[:2], make, lambda graphs: blurred).table["recommendation"]
    assert said == "fp32 is kept; whether fp16 pays, this machine cannot tell"
    without = try_all([forms[0], forms[2]], make, time_graphs).table["recommendation"]
    assert without == "fp32 is kept; int8-cpu missed a gate and cannot be chosen"


@pytest.mark.parametrize(
    "failure",
    [
        VerificationError("parity: too far."),
        WorkFailed("the engine cannot be opened."),
        UserError("fp16 needs a converter."),
    ],
)
def test_a_candidate_that_fails_is_a_row_of_the_table(fp32, failure):
    """The others go on, and the reason is kept."""
    graph = fp32.path / "model.onnx"
    timed = []

    def make(form):
        if form.precision == "fp16":
            raise failure
        return replace(unconverted(form_of("fp32", "cpu"), graph), form=form)

    def time_graphs(graphs):
        timed.extend(graphs)
        found = GraphTiming(1.0, (0.9, 1.1), 2.0, "slower", "slower")
        return Race(dict.fromkeys(graphs, found), {"batch": 1})

    tried = try_all(IN_ONNX, make, time_graphs)
    assert timed == ["fp32", "int8-cpu"] and tried.chosen.form.precision == "fp32"
    assert tried.table["trials"][1]["reason"] == str(failure)
    assert tried.table["recommendation"] == "int8-cpu did not pay here: fp32 is kept; fp16 failed"
