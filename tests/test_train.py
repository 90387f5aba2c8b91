"""`fit` end to end: what a run leaves behind, that it learns, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdpd_deploy import export_run
from mdpd_deploy.artifacts.outputs import read_outputs
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.commands.train import build_config, plan
from mdpd_deploy.config import load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks.metrics import compute
from mdpd_deploy.train import check_options
from mdpd_deploy.train.setup import prepare


def test_a_run_directory_holds_the_contract(tiny_run):
    names = {path.name for path in tiny_run.path.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "model",
        "report.html",
    }
    assert {p.name for p in (tiny_run.path / "model").iterdir()} == {
        "delta.safetensors", "side.safetensors", "labels.json", "preprocess.json",
    }  # fmt: skip
    summary = json.loads((tiny_run.path / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["primary_metric"] == "accuracy"
    assert set(summary["metrics"]) == {"deployed", "side"}
    assert set(summary["params"]) >= {"backbone", "trained", "deployed_delta", "side"}
    assert summary["memory"]["peak_live_bytes"] == pytest.approx(
        summary["memory"]["forecast_bytes"], rel=0.02
    )
    delta = load_file(tiny_run.path / "model" / "delta.safetensors")
    assert sum(t.numel() for t in delta.values()) == summary["params"]["deployed_delta"]
    assert "<svg" in (tiny_run.path / "report.html").read_text()


def test_the_deployed_model_is_backbone_with_tuned_norms_and_head_alone(tiny_run):
    """Loading the delta into a plain backbone gives the training-time Y_B."""
    model = tiny_run.load_deployed()
    bare = load_backbone(tiny_run.config.backbone)
    changed = [
        name for name, value in model.backbone.state_dict().items()
        if not torch.equal(value, bare.state_dict()[name])
    ]  # fmt: skip
    assert set(changed) == set(bare.norms())
    assert not any("side" in name for name, _ in model.named_modules())


def test_training_learns(tmp_path, text_options, many, fit_in):
    run = fit_in(tmp_path / "run", text_options, data=many / "labels", steps=150, lr=3e-3)
    lines = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_student"] for line in lines if line["split"] == "train"]
    assert min(losses) < 0.7 * losses[0]
    assert run.summary["metrics"]["deployed"]["accuracy"] >= 0.75
    assert run.summary["metrics"]["side"]["accuracy"] >= 0.75


@pytest.mark.parametrize(
    "option", ["loss.label_smoothing=0.1", "loss.logits_form=kl", "train.class_weights=balanced"]
)
def test_a_regression_refuses_what_is_for_classes(option, tmp_path, text_options, many, fit_in):
    options = {**text_options, "task": "regress", "data": many / "scores"}
    name, _, value = option.partition("=")
    with pytest.raises(UserError, match=rf"{name}={value} is for classes"):
        fit_in(tmp_path / "run", options, set=[option])
    assert not (tmp_path / "run").exists()


def test_regression_scores_come_out_in_the_labels_unit(tmp_path, text_options, many, fit_in):
    options = {**text_options, "task": "regress", "data": many / "scores"}
    run = fit_in(tmp_path / "run", options, steps=150, lr=3e-3)
    assert run.summary["primary_metric"] == "pearson_spearman"
    assert run.summary["metrics"]["deployed"]["pearson_spearman"] > 0.6
    model, split = run.load_deployed(), run.load_evaluation()["validation"]
    arrays = run.preprocess(list(split.inputs))
    with torch.no_grad():
        scores = model(*(torch.from_numpy(arrays[n]) for n in model.backbone.input_names)).numpy()
    assert abs(float(scores.mean()) - float(split.labels.mean())) < 0.3
    assert float(np.sqrt(np.mean((scores[:, 0] - split.labels) ** 2))) < float(split.labels.std())


def test_equal_runs_give_equal_bytes_and_another_seed_does_not(
    tmp_path, image_options, tiny_run, fit_in
):
    again = fit_in(tmp_path / "again", image_options)
    other = fit_in(tmp_path / "other", image_options, seed=1)
    for file in ("delta.safetensors", "side.safetensors"):
        first = (tiny_run.path / "model" / file).read_bytes()
        assert (again.path / "model" / file).read_bytes() == first
        assert (other.path / "model" / file).read_bytes() != first


def test_bf16_and_random_backbones_train_and_reload(tmp_path, image_options, fit_in):
    run = fit_in(
        tmp_path / "run", image_options, steps=3,
        set=["train.precision=bf16", "backbone.pretrained=false"],
    )  # fmt: skip
    assert (run.path / "model" / "backbone.safetensors").is_file()
    assert (
        Run.open(run.path).load_deployed().backbone.source.sha256
        == run.summary["backbone"]["sha256"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"task": "clasify"}, "Did you mean 'classify'"),
        ({"method": "mpd"}, "Did you mean 'mdpd'"),
        ({"side": "unipt2"}, "Did you mean 'unipt'"),
        ({"backbone": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data": "nowhere"}, "nowhere"),
        ({"set": ["side.reduction=5"]}, "Valid values: 1, 2, 4"),
        ({"set": ["optim.lrr=1"]}, "unknown option 'optim.lrr'. Did you mean 'lr'"),
        ({"set": ["train.norm_grad=late:0"]}, "late:K"),
        ({"set": ["optim.lr=fast"]}, "option optim.lr"),
        ({"method": "norms", "set": ["train.norm_grad=local"]}, "use recompute, full or late:K"),
        ({"set": ["train.norm_grad=late:9"]}, "the backbone has 3 blocks"),
        ({"method": "prefix"}, "takes no further keys and values, .*; use --method prompt"),
        ({"device": "cuda"}, "--device cuda: no CUDA device"),
    ],
)
def test_bad_words_are_one_sentence_and_leave_nothing(
    tmp_path, image_options, words, message, fit_in
):
    if words.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        fit_in(tmp_path / "run", image_options, **words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_backbone_of_the_wrong_modality_is_refused(tmp_path, image_options, tiny_bert, fit_in):
    with pytest.raises(
        UserError, match=r"works on images, but --backbone .* takes texts: name one"
    ):
        fit_in(
            tmp_path / "run", {**image_options, "backbone": tiny_bert}, set=["data.max_length=24"]
        )


def test_a_config_file_flags_and_sets_merge_in_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lr: 1e-4\n  warmup: 0.2\ntrain: {batch: 4}\n")
    config = load_config(file, {"train.batch": 8}, ["optim.warmup=0.3"])
    assert (config.optim.lr, config.optim.warmup, config.train.batch) == (1e-4, 0.3, 8)
    written = tmp_path / "w.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config


def test_a_tracker_gets_the_numbers_or_its_absence_is_named(tmp_path, image_options, fit_in):
    import importlib.util

    asked = ["track.to=[tensorboard]"]
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UserError, match=r'pip install "mdpd-deploy\[track\]"'):
            fit_in(tmp_path / "run", image_options, set=asked)
        assert not (tmp_path / "run").exists()
        return
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]  # the extra `track`
        EventAccumulator,
    )

    run = fit_in(tmp_path / "run", image_options, set=asked)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/loss", "validation/deployed/accuracy", "validation/side/accuracy"}
    last = events.Scalars("validation/deployed/accuracy")[-1]
    assert last.step == 6


def test_pictures_that_training_skipped_are_skipped_afterwards(
    tmp_path, image_options, digit_folder, fit_in
):
    data = tmp_path / "data"
    shutil.copytree(digit_folder, data)
    bad = data / "validation" / "digit1" / "013.png"
    bad.write_bytes(bad.read_bytes()[:60])
    run = fit_in(tmp_path / "run", image_options, data=data, steps=1, set=["data.bad_images=skip"])
    assert len(Run.open(run.path).load_evaluation()["validation"]) == 17
    assert len(Run.open(run.path).load_evaluation(str(data / "validation"))["validation"]) == 17
    assert export_run(run.path).manifest["verification"]["metric"]["verdict"] == "passed"


def test_the_home_folder_may_be_written_short(tmp_path, image_options, monkeypatch, digit_folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(digit_folder, tmp_path / "my pics")
    setup = prepare(build_config(None, [], {**image_options, "data": "~/my pics"}))
    assert len(setup.data.train) == 36


def test_a_path_may_hold_what_a_config_would_interpolate(
    tmp_path, text_options, sentence_folder, fit_in
):
    data = tmp_path / "a${b}"
    shutil.copytree(sentence_folder, data)
    run = fit_in(tmp_path / "run", text_options, data=data, steps=1)
    assert Run.open(run.path).config.data.path == str(data)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("norms", "side.name=sherl"), ("probe", "train.norm_grad=full"), ("side", "loss.logits=0.5"),
        ("side", "optim.head_lr=1e-3"), ("norms", "train.student_task_weight=0"),
        ("probe", "distill.mask_ratio=0.1"), ("mdpd", "data.max_length=64"),
        ("mdpd", "peft.rank=4"), ("prompt", "peft.rank=4"), ("ia3", "peft.targets=all"),
        ("lora", "peft.tokens=5"), ("ia3", "peft.rank=4"), ("prompt", "optim.norm_lr=1e-3"),
    ],
)  # fmt: skip
def test_an_option_that_the_method_would_ignore_is_refused(method, option, image_options):
    with pytest.raises(UserError, match=option.split("=")[0].replace(".", r"\.")):
        plan(**image_options, method=method, set=[option])


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["optim.norm_lr=1e-3"], "optim.norm_lr=0.001 does nothing with train.norm_grad=none"),
        (["optim.norms_after=0.5"], "optim.norms_after=0.5 does nothing with train.norm_grad=none"),
        (["side.name=dtl", "distill.mask_ratio=0.1"], "distill.mask_ratio=0.1 does nothing with --side"
         + " dtlv1 and loss.shallow and loss.deep at 0: leave it out"),
        (["loss.deep=0", "loss.shallow=0", "distill.share_phi=true"], "distill.share_phi=True"),
    ],
)  # fmt: skip
def test_an_option_that_another_option_silences_is_refused(sets, told, image_options):
    without = [] if "norm_grad" not in told else ["train.norm_grad=none"]
    with pytest.raises(UserError, match=re.escape(told)):
        plan(**image_options, set=[*without, *sets])


def test_what_still_counts_is_accepted(image_options):
    for sets in (
        ["side.name=dtl", "loss.deep=1e-5", "distill.mask_ratio=0.1"],
        ["loss.deep=0", "distill.bottleneck=4"],
        ["train.norm_grad=none", "optim.head_lr=1e-3"],
    ):
        check_options(build_config(None, sets, {"method": "mdpd"}))


def test_a_run_keeps_what_it_answered_and_every_metric_follows_from_it(tiny_run):
    for model in ("deployed", "side"):
        outputs, labels = read_outputs(tiny_run.path, "validation", model)
        metrics = tiny_run.summary["metrics"][model]
        assert compute(list(metrics), outputs, labels) == metrics
    assert read_outputs(tiny_run.path, "nothing") is None


def test_the_summary_says_what_no_learning_at_all_scores(tiny_text_run):
    validation = tiny_text_run.load_evaluation()["validation"].labels
    train = tiny_text_run.load_task_data().train.labels
    most = np.bincount(train).argmax()
    assert tiny_text_run.summary["majority"]["accuracy"] == (validation == most).mean()
    report = (tiny_text_run.path / "report.html").read_text()
    assert "always answering the most frequent class" in report
