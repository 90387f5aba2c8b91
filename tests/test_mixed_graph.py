"""Surgery on graphs made by hand: norms of any place and any tuned part, in every form."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdpd_deploy.errors import ExportError
from mdpd_deploy.graphs.deltas import HEAD_BIAS, HEAD_WEIGHT
from mdpd_deploy.graphs.mixed import mixed_graph
from mdpd_deploy.runtimes.onnx import OnnxRunner

pytest.importorskip("onnxruntime", reason="runs exported graphs")


def normalised(x, scale, shift):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * scale + shift


def by_hand(norm_inputs, *, pooled_first):
    """x [B, N, 4] → mean over tokens and a norm, in either order → a head of two outputs."""
    order = ["x", "mean", "normal"] if pooled_first else ["x", "normal", "mean"]
    norm = helper.make_node("LayerNormalization", [order[order.index("normal") - 1], *norm_inputs],
                            ["normal"], name="norm", axis=-1)  # fmt: skip
    mean = helper.make_node("ReduceMean", [order[order.index("mean") - 1], "one"], ["mean"],
                            name="pool", keepdims=0)  # fmt: skip
    gemm = helper.make_node("Gemm", [order[-1], HEAD_WEIGHT, HEAD_BIAS], ["outputs"], name="head",
                            transB=1)  # fmt: skip
    info = helper.make_tensor_value_info
    shapes = {"mean": ["batch", 4], "normal": ["batch", 4] if pooled_first else ["batch", "n", 4]}
    rng = np.random.default_rng(3)
    weights = {"scale": rng.standard_normal(4), "shift": rng.standard_normal(4),
               HEAD_WEIGHT: rng.standard_normal((2, 4)), HEAD_BIAS: rng.standard_normal(2)}  # fmt: skip
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    graph = helper.make_graph(
        [mean, norm, gemm] if pooled_first else [norm, mean, gemm], "g",
        [info("x", TensorProto.FLOAT, ["batch", "n", 4])],
        [info("outputs", TensorProto.FLOAT, ["batch", 2])],
        [*tensors, numpy_helper.from_array(np.array([1]), "one")],
        value_info=[info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("form", ["explicit", "fused", "tensorrt"])
@pytest.mark.parametrize("pooled_first", [False, True])
@pytest.mark.parametrize("tuned", [("scale", "shift"), ("scale",), ("shift",)])
def test_norms_of_any_place_and_any_tuned_part(form, pooled_first, tuned, tmp_path):
    base = by_hand(["scale", "shift"], pooled_first=pooled_first)
    own = {t.name: numpy_helper.to_array(t) for t in base.graph.initializer if t.name != "one"}
    rng = np.random.default_rng(0)
    tasks = [
        {
            n: rng.standard_normal(own[n].shape).astype(np.float32)
            for n in (*tuned, HEAD_WEIGHT, HEAD_BIAS)
        }
        for _ in range(3)
    ]
    mixed = mixed_graph(base, tasks, form=form)
    onnx.checker.check_model(mixed, full_check=True)
    notes = {"mdpd.tasks": json.dumps([{"name": str(i)} for i in range(3)])}
    onnx.helper.set_model_props(mixed, notes)
    onnx.save(mixed, tmp_path / "m.onnx")
    x = rng.standard_normal((5, 6, 4)).astype(np.float32)
    ids = np.array([2, 0, 1, 1, 0])
    found = OnnxRunner(tmp_path / "m.onnx")({"x": x, "task_id": ids})["outputs"]
    for row, task in enumerate(ids):
        value = {**own, **tasks[task]}
        if pooled_first:
            pooled = normalised(x[row].mean(0), value["scale"], value["shift"])
        else:
            pooled = normalised(x[row], value["scale"], value["shift"]).mean(0)
        expected = value[HEAD_WEIGHT] @ pooled + value[HEAD_BIAS]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_weight_that_something_else_reads_is_refused():
    base = by_hand(["scale", "shift"], pooled_first=False)
    base.graph.node.append(helper.make_node("Relu", ["shift"], ["unused"], name="relu"))
    task = {n: numpy_helper.to_array(t) for t in base.graph.initializer if (n := t.name) != "one"}
    with pytest.raises(ExportError, match="shift is read by Relu"):
        mixed_graph(base, [task])
