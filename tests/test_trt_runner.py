"""Running and refitting an engine, driven with a stand-in for TensorRT and CUDA."""

import threading

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mdpd_deploy.checks.compare import Case
from mdpd_deploy.errors import UserError, VerificationError, WorkFailed
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.onnx import OnnxRunner

pytest.importorskip("onnxruntime", reason="runs exported graphs")


CLASSES = 2


@pytest.fixture(scope="module")
def graph(tiny_trt_bundle):
    return tiny_trt_bundle / "model.onnx"


@pytest.fixture(scope="module")
def refittable(graph):
    names = [tensor.name for tensor in onnx.load(graph).graph.initializer]
    return sorted(n for n in names if "norm" in n.lower() or n.startswith("head."))


@pytest.fixture
def build(graph, refittable, stand_in, tmp_path):
    """Build the graph's engine with a profile; returns the runner and the stand-ins."""

    def make(batch=(1, 8, 32), tokens=(1, 16, 24), refit=False):
        modules = stand_in()
        from mdpd_deploy.export.tensorrt.build import build_plan
        from mdpd_deploy.export.tensorrt.options import EngineOptions
        from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner

        shape = {b: [batch[i], tokens[i]] for i, b in enumerate(("min", "opt", "max"))}
        names = [value.name for value in onnx.load(graph).graph.input]
        built = build_plan(
            graph,
            dict.fromkeys(names, shape),
            EngineOptions(refit=refit),
            refit=refittable if refit else (),
        )
        plan = tmp_path / "model.plan"
        plan.write_bytes(built.plan)
        return TrtRunner(plan, metadata={"mdpd.kind": "classify"}), *modules

    return make


def sentences(batch=3, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, tokens), dtype=np.int64)
    mask[0, 3:] = 0
    return {
        "input_ids": rng.integers(4, 20, (batch, tokens)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((batch, tokens), dtype=np.int64),
    }


def test_it_is_called_as_the_onnx_runner_is(build, graph):
    runner, *_ = build()
    reference = OnnxRunner(graph)
    for name in ("input_names", "output_names"):
        assert getattr(runner, name) == getattr(reference, name)
    assert runner.device == "cuda" and runner.metadata == {"mdpd.kind": "classify"}
    for batch, tokens in ((3, 5), (1, 1), (32, 24), (2, 24), (3, 5)):
        arrays = sentences(batch, tokens, seed=batch)
        found = only(runner(arrays))
        assert found.dtype == np.float32 and found.shape == (batch, CLASSES)
        np.testing.assert_allclose(found, only(reference(arrays)), atol=1e-5)
    turned = {name: np.asfortranarray(array) for name, array in sentences(4, 6).items()}
    np.testing.assert_allclose(only(runner(turned)), only(reference(sentences(4, 6))), atol=1e-5)


def test_a_small_batch_fills_a_static_engine(build, graph):
    runner, *_ = build(batch=(4, 4, 4))
    arrays = sentences(3, 7)
    np.testing.assert_allclose(only(runner(arrays)), only(OnnxRunner(graph)(arrays)), atol=1e-5)
    assert runner.max_batch == 4


BAD = {
    "too many rows": (lambda a: sentences(33), r"input_ids has shape 33 x 5, the engine takes 1..32 x 1..24"),
    "too long": (lambda a: sentences(2, 25), "has shape 2 x 25"),
    "another rank": (lambda a: a | {"input_ids": a["input_ids"][..., None]}, "has shape 3 x 5 x 1"),
    "another dtype": (lambda a: a | {"input_ids": a["input_ids"].astype(np.int32)}, "input_ids must be int64, given int32"),
    "missing": (lambda a: {"input_ids": a["input_ids"]}, "the engine takes input_ids, attention_mask, token_type_ids; given: input_ids"),
    "unknown": (lambda a: a | {"pixels": a["input_ids"]}, "given: .*pixels"),
    "no rows": (lambda a: {n: v[:0] for n, v in a.items()}, "the batch is empty"),
    "uneven": (lambda a: a | {"input_ids": a["input_ids"][:2]}, "differ in their number of rows"),
    "a scalar": (lambda a: {n: np.int64(1).reshape(()) for n in a}, "the batch is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_outside_the_profile_is_the_callers_fault(build, name):
    change, words = BAD[name]
    runner, *_ = build()
    with pytest.raises(UserError, match=words) as refused:
        runner(change(sentences()))
    assert "\n" not in str(refused.value)
    assert runner.failed is None and only(runner(sentences())).shape == (3, CLASSES)


def test_a_failed_run_ends_the_runner(build):
    runner, trt, cuda = build()
    trt._faults["execute"] = True
    with pytest.raises(WorkFailed, match="TensorRT refused the run: the enqueue failed"):
        runner(sentences())
    del trt._faults["execute"]
    with pytest.raises(WorkFailed, match="stopped answering; start it again"):
        runner(sentences())
    runner, trt, cuda = build()
    cuda._faults["cudaStreamSynchronize"] = 700
    with pytest.raises(WorkFailed, match="cudaErrorIllegalAddress"):
        runner(sentences())
    assert runner.failed is not None


def test_threads_share_a_runner(build, graph):
    runner, *_ = build()
    batches = [sentences(1 + i % 5, 3 + i % 7, seed=i) for i in range(12)]
    found = {}

    def work(index):
        found[index] = runner(batches[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reference = OnnxRunner(graph)
    for index, arrays in enumerate(batches):
        np.testing.assert_allclose(only(found[index]), only(reference(arrays)), atol=1e-5)


def test_device_memory_is_given_back(build):
    runner, _, cuda = build()
    before = len(cuda._device)
    for batch in (1, 32, 2, 16):
        runner(sentences(batch, 24))
    assert len(cuda._device) == max(before, 4)
    del runner
    assert not cuda._device and not cuda._queues


# --- another task on the same engine --------------------------------------------------------------


@pytest.fixture(scope="module")
def other(graph, refittable, tmp_path_factory):
    """Values of another task, and the graph that holds them."""
    proto = onnx.load(graph)
    rng = np.random.default_rng(1)
    delta = {}
    for tensor in proto.graph.initializer:
        if tensor.name in refittable:
            array = numpy_helper.to_array(tensor)
            delta[tensor.name] = (array + rng.normal(0, 0.3, array.shape)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(delta[tensor.name], tensor.name))
    path = tmp_path_factory.mktemp("other") / "model.onnx"
    onnx.save(proto, path)
    return delta, path


@pytest.fixture(scope="module")
def first(graph, refittable):
    tensors = onnx.load(graph).graph.initializer
    return {t.name: numpy_helper.to_array(t) for t in tensors if t.name in refittable}


def golden(path):
    return Case("golden", sentences(4, 9, seed=7), OnnxRunner(path)(sentences(4, 9, seed=7)))


def test_a_delta_turns_the_engine_into_the_other_task(build, graph, other, first):
    from mdpd_deploy.runtimes.tensorrt.refit import apply_delta, refittable_names

    delta, path = other
    runner, *_ = build(refit=True)
    assert refittable_names(runner) == tuple(sorted(delta))
    apply_delta(runner, delta, golden(path), tolerance=1e-4)
    np.testing.assert_allclose(
        only(runner(sentences())), only(OnnxRunner(path)(sentences())), atol=1e-4
    )
    apply_delta(runner, first, golden(graph), tolerance=1e-4)
    np.testing.assert_allclose(
        only(runner(sentences())), only(OnnxRunner(graph)(sentences())), atol=1e-4
    )


MISFITS = {
    "a name too few": (lambda d: dict(list(d.items())[1:]), "does not fit the engine: it lacks"),
    "a name too many": (lambda d: d | {"blocks.0": d["head.linear.bias"]}, "holds blocks.0, which is fixed"),
    "another size": (lambda d: d | {"head.linear.bias": np.zeros(7, np.float32)}, "head.linear.bias is 7 x float32, expected 2"),
    "another dtype": (lambda d: d | {"head.linear.bias": np.zeros(CLASSES)}, "is 2 x float64"),
    "not finite": (lambda d: d | {"head.linear.bias": np.full(CLASSES, np.nan, np.float32)}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_delta_that_does_not_fit_changes_nothing(build, graph, other, name):
    from mdpd_deploy.runtimes.tensorrt.refit import apply_delta

    change, words = MISFITS[name]
    delta, path = other
    runner, *_ = build(refit=True)
    with pytest.raises(UserError, match=words):
        apply_delta(runner, change(delta), golden(path), tolerance=1e-4)
    np.testing.assert_allclose(
        only(runner(sentences())), only(OnnxRunner(graph)(sentences())), atol=1e-5
    )


FAULTS = {
    "set_named_weights": (True, "TensorRT refused .* is not refittable"),
    "missing": (["conv1.bias"], "wants 1 more weights, first conv1.bias"),
    "refit": (True, "could not refit the engine: the refit failed"),
    "forgotten": ("head.linear.bias", "outputs are off by .* allowed 1e-04"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refit_that_fails_is_caught_and_put_back(build, graph, other, first, fault):
    from mdpd_deploy.runtimes.tensorrt.refit import apply_delta

    how, words = FAULTS[fault]
    delta, path = other
    runner, trt, _ = build(refit=True)
    trt._faults[fault] = how
    with pytest.raises(VerificationError, match=f"refit: .*{words}"):
        apply_delta(runner, delta, golden(path), tolerance=1e-4)
    with pytest.raises(WorkFailed, match="stopped answering"):
        runner(sentences())
    if fault == "forgotten":  # the others would fail the way back too
        trt._faults.clear()
        runner, trt, _ = build(refit=True)
        trt._faults[fault] = how
        with pytest.raises(VerificationError):
            apply_delta(runner, delta, golden(path), tolerance=1e-4, previous=first)
        np.testing.assert_allclose(
            only(runner(sentences())), only(OnnxRunner(graph)(sentences())), atol=1e-5
        )


def test_an_engine_without_refit_says_so(build, other):
    from mdpd_deploy.runtimes.tensorrt.refit import apply_delta

    delta, path = other
    runner, *_ = build()
    with pytest.raises(UserError, match=r"cannot be refitted: .*--refit"):
        apply_delta(runner, delta, golden(path), tolerance=1e-4)


NO_TORCH = """
import sys, numpy as np
from pathlib import Path
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
import mdpd_deploy.runtimes.tensorrt.refit, mdpd_deploy.runtimes.tensorrt.cache
runner = TrtRunner(Path(sys.argv[1]))
arrays = {name: np.ones((2, 4), dtype=np.int64) for name in runner.input_names}
print({name: array.shape for name, array in runner(arrays).items()})
sys.exit("torch" in sys.modules)
"""


def test_running_an_engine_loads_no_torch(build, tmp_path, run_python, request):
    build()
    fakes = request.path.parent / "fakes"
    done = run_python("-c", NO_TORCH, str(tmp_path / "model.plan"), PYTHONPATH=str(fakes))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'logits': (2, 2)}"
