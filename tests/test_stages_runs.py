"""Networks in stages from training to serving: one MDPD run and one of norms alone on each."""

import shutil

import pytest
import torch

from mdpd_deploy import bench_latency, export_run, fit, load_bundle, verify_bundle
from mdpd_deploy.commands.export import export_runs
from mdpd_deploy.train.checkpoint import load_best
from mdpd_deploy.train.setup import prepare

pytest.importorskip("onnxruntime", reason="runs exported graphs")

SIDES = {"resnet": "unipt", "swin": "sherl", "convnext": "dtlv1"}


@pytest.fixture(scope="module", params=list(SIDES))
def runs(request, staged_folder, digit_folder, fit_in, tmp_path_factory):
    """Three classes by MDPD, and two of them by norms alone."""
    root = tmp_path_factory.mktemp(request.param)
    for name in ("train/digit0", "train/digit1", "validation/digit0", "validation/digit1"):
        shutil.copytree(digit_folder / name, root / "data" / name)
    options = dict(task="classify", backbone=staged_folder(request.param), steps=2, batch=8)
    side = SIDES[request.param]
    three = fit_in(root / "mdpd", options, data=digit_folder, method="mdpd", side=side,
                   set=["checkpoint.every=1"])  # fmt: skip
    two = fit_in(root / "norms", options, data=root / "data", method="norms")
    return request.param, three, two


def test_a_run_is_loaded_as_it_was_trained(runs):
    _, run, _ = runs
    assert run.summary["backbone"]["taps"] is True
    trained = prepare(run.config).method
    load_best(run.path / "checkpoints", trained)
    trained.eval_mode()
    inputs = trained.backbone.example_inputs(3)
    beside, own = run.load_with_side()
    assert own
    with torch.no_grad():
        expected = trained.outputs(inputs)
        close = dict(rtol=1e-4, atol=1e-5)
        for found, answer in ((run.load_deployed(), "deployed"), (beside, "side")):
            torch.testing.assert_close(found(*inputs.values()), expected[answer], **close)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, digit_folder, tmp_path):
    """Batch norms of the side network have statistics, which a checkpoint keeps."""
    _, run, _ = runs
    copied = shutil.copytree(run.path, tmp_path / "run")
    (copied / "summary.json").unlink()
    before = (copied / "model" / "side.safetensors").read_bytes()
    shutil.rmtree(copied / "model")
    kept = sorted((copied / "checkpoints").glob("step-*"))
    assert len(kept) > 1 or int(kept[0].name[5:]) == 1
    for later in kept[1:]:
        shutil.rmtree(later)
    fit(resume=copied, quiet=True)
    assert (copied / "model" / "side.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("unwarmed")
def test_export_verify_predict_and_latency(runs, digit_folder, tmp_path):
    name, run, _ = runs
    bundle = export_run(run.path, out=tmp_path / "bundle")
    verdicts = {gate: entry["verdict"] for gate, entry in bundle.manifest["verification"].items()}
    assert set(verdicts.values()) == {"passed"}
    assert {"identity", "parity", "golden"} <= set(verdicts)
    assert verify_bundle(bundle.path).unsound == []
    picture = next((digit_folder / "validation").rglob("*.png"))
    (answer,) = load_bundle(bundle.path).predict([picture])
    assert answer.label in run.task.labels
    if name != "resnet":
        return
    words = dict(runtime=["onnx"], batch=[1], seconds=0.05, openings=3, rivals=["bare", "sherl"])
    timed = [note["name"] for note in bench_latency(run.path, **words)["variants"]]
    assert {"bare", "sherl"} <= set(timed)


def test_two_tasks_share_one_graph(runs, digit_folder, tmp_path):
    name, three, two = runs
    if name == "swin":
        pytest.skip("its norms are those of convnext, and its graph takes three times as long")
    bundle = export_runs([three.path, two.path], names=["three", "two"], out=tmp_path / "both")
    assert {"mixed", "swap", "parity"} <= set(bundle.manifest["verification"])
    added = bundle.manifest["mixed"]["added_nodes"]
    assert added["Mul"] == added["Add"] - 1 == len(three.load_backbone().norms()) // 2  # the head's
    both = load_bundle(bundle.path)
    picture = next((digit_folder / "validation").rglob("*.png"))
    for task, run in (("three", three), ("two", two)):
        (answer,) = both.predict([picture], task=task)
        assert answer.label in run.task.labels
