"""`fit` end to end: what a run leaves behind, that it learns, and that it can be interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdpd_deploy import export_run, fit
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.cli import main
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import claimed
from mdpd_deploy.run import Run
from mdpd_deploy.sides import SIDES
from mdpd_deploy.train.batches import Schedule, StepDataset
from mdpd_deploy.train.loop import one_step
from mdpd_deploy.train.methods import METHODS
from mdpd_deploy.train.optim import build_optimizer
from mdpd_deploy.train.setup import prepare

ROWS = [(method, "unipt") for method in sorted(METHODS) if method not in ("side", "mdpd")]
ROWS += [("side", side) for side in sorted(SIDES)]
ROWS += [("mdpd", side) for side in sorted(SIDES) if not side.startswith("dtlv2")]


def fit_in(folder, options, **more):
    both = {**options, **more}
    both["set"] = [*options.get("set", ()), *more.get("set", ())]
    return fit(out=folder, quiet=True, **both)


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
    """Loading the delta into a plain backbone gives the training-time Y_B (methods 3.6)."""
    model = tiny_run.load_deployed()
    bare = load_backbone(tiny_run.config.backbone)
    changed = [
        name for name, value in model.backbone.state_dict().items()
        if not torch.equal(value, bare.state_dict()[name])
    ]  # fmt: skip
    assert set(changed) == set(bare.norms())
    assert not any("side" in name for name, _ in model.named_modules())


def declared(method, backbone):
    """The backbone's tensors that a method trains, said in other words than the method's."""
    weights = [name for name, _ in backbone.named_parameters()]
    if method == "bitfit":
        kept = [name for name in weights if "embed" not in name]
        return {name for name in kept if name.endswith(".bias")}
    ends = {
        "lora": ("query.weight", "value.weight", "qkv.weight"),
        # biases are scaled too, and stay: those of a tiny encoder are all zero
        "ia3": ("key.weight", "value.weight", "qkv.weight", "fc2.weight", "0.output.dense.weight",
                "1.output.dense.weight", "2.output.dense.weight"),
    }  # fmt: skip
    ends["adalora"] = ends["lora"]
    if method in ends:
        return {name for name in weights if name.endswith(ends[method])}
    known = {"full": weights, "mdpd": backbone.norms(), "norms": backbone.norms()}
    return set(known.get(method, ()))


@pytest.mark.parametrize(
    ("method", "side", "modality"),
    [
        (*row, modality)
        for modality in ("image", "text")
        for row in ROWS
        if (row[0], modality) != ("prefix", "image")
    ],
)
def test_each_method_changes_only_what_it_declares_and_reloads_equal(
    method, side, modality, tmp_path, image_options, text_options
):
    options = dict(image_options if modality == "image" else text_options)
    options["set"] = ["data.max_length=24"] if modality == "text" else []
    if method in ("side", "mdpd") and not side.startswith("dtl"):
        options["set"].append("side.reduction=2")
    run = fit_in(tmp_path / "run", options, method=method, side=side, steps=2)
    model = run.load_deployed()
    fresh = load_backbone(run.config.backbone, max_length=24)
    tuned = declared(method, fresh)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]) == (name not in tuned), name
    reported = run.summary["metrics"]["deployed"]["accuracy"]
    split = run.load_evaluation()["validation"]
    arrays = run.preprocess(list(split.inputs))
    with torch.no_grad():
        logits = model(*(torch.from_numpy(arrays[name]) for name in model.backbone.input_names))
    assert float((logits.argmax(-1).numpy() == split.labels).mean()) == pytest.approx(reported)


def test_training_learns(tmp_path, text_options, many):
    run = fit_in(tmp_path / "run", text_options, data=many / "labels", steps=150, lr=3e-3)
    lines = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_student"] for line in lines if line["split"] == "train"]
    assert min(losses) < 0.7 * losses[0]
    assert run.summary["metrics"]["deployed"]["accuracy"] >= 0.75
    assert run.summary["metrics"]["side"]["accuracy"] >= 0.75


def test_regression_scores_come_out_in_the_labels_unit(tmp_path, text_options, many):
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


def test_equal_runs_give_equal_bytes_and_another_seed_does_not(tmp_path, image_options, tiny_run):
    again = fit_in(tmp_path / "again", image_options)
    other = fit_in(tmp_path / "other", image_options, seed=1)
    for file in ("delta.safetensors", "side.safetensors"):
        first = (tiny_run.path / "model" / file).read_bytes()
        assert (again.path / "model" / file).read_bytes() == first
        assert (other.path / "model" / file).read_bytes() != first


def wait_for(condition, process, seconds=240):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < limit
        time.sleep(0.02)


def command(*words):
    return [sys.executable, "-P", "-m", "mdpd_deploy", *map(str, words)]


def test_kill_9_then_resume_is_bit_identical(tmp_path, tiny_bert, sentence_folder):
    words = [
        "train", "--task", "classify", "--data", sentence_folder, "--text", "sentence",
        "--backbone", tiny_bert, "--steps", "160", "--batch", "8", "--side", "sherl",
        "--set", "side.reduction=2", "--set", "data.max_length=24", "--set", "checkpoint.every=1",
        "--set", "train.eval_every=40",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        command(*words, "--out", killed), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: any(killed.glob("checkpoints/step-000000[1-9]*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model").exists() and not (killed / "summary.json").exists()
    with pytest.raises(UserError, match=r"is not finished: `mdpd train --resume"):
        Run.open(killed)
    done = [int(p.name[5:]) for p in killed.glob("checkpoints/step-*")]
    assert 0 < max(done) < 160
    resumed = subprocess.run(
        command("train", "--resume", killed),
        env=env,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert b"resuming" in resumed.stderr
    subprocess.run(command(*words, "--out", whole), env=env, check=True, capture_output=True)
    for file in ("delta.safetensors", "side.safetensors"):
        assert (killed / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [40, 80, 120, 160]
    assert Run.open(killed).summary["metrics"] == Run.open(whole).summary["metrics"]


def test_resuming_a_completed_run_changes_nothing(tiny_run):
    before = (tiny_run.path / "summary.json").stat().st_mtime_ns
    assert fit(resume=tiny_run.path, quiet=True).summary == tiny_run.summary
    assert (tiny_run.path / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="give no other option"):
        fit(resume=tiny_run.path, lr=1.0)


def interrupted(tmp_path, options):
    """A run that stopped after its last checkpoint, before it was finished."""
    import shutil

    run = fit_in(tmp_path / "run", options, set=["checkpoint.every=2", "train.eval_every=2"])
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.path / "model")
    (checkpoint,) = run.path.glob("checkpoints/step-*")
    return run.path, checkpoint


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, image_options):
    path, checkpoint = interrupted(tmp_path, image_options)
    tensors = checkpoint / "state.safetensors"
    good = tensors.read_bytes()
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged \(its SHA-256 differs\); delete"):
        fit(resume=path, quiet=True)
    tensors.write_bytes(good)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "schema": 99}))
    with pytest.raises(UserError, match="was not written by this version"):
        fit(resume=path, quiet=True)
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        fit(resume=path, quiet=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert fit(resume=path, quiet=True).summary["status"] == "completed"


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, image_options):
    words = [
        "train",
        "--task",
        "classify",
        "--data",
        image_options["data"],
        "--backbone",
        image_options["backbone"],
        "--steps",
        "4",
        "--device",
        "cpu",
        "--set",
        "backbone.dropout_active=false",
        "--set",
        "train.keep=last",
        "--set",
        "data.limit=17",
    ]  # fmt: skip                     of 17 examples the third step has one, and a process none
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        command(*words, "--batch", "8", "--out", tmp_path / "one"),
        env=env,
        capture_output=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr.decode()
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29611",
    ]
    both = subprocess.run(
        [*launch, "-m", "mdpd_deploy", *map(str, words), "--batch", "4"],
        env=env, capture_output=True, timeout=300, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert both.returncode == 0, both.stderr.decode()[-3000:]
    (two,) = (tmp_path / "runs").iterdir()  # both processes chose the same folder
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    for file in ("delta.safetensors", "side.safetensors"):
        one = load_file(tmp_path / "one" / "model" / file)
        other = load_file(two / "model" / file)
        assert set(one) == set(other)
        for name in set(one) - {"side.gate.bias"}:  # shifts a softmax: its gradient is rounding
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


def test_accumulation_equals_the_larger_batch(tmp_path, image_options):
    still = ["backbone.dropout_active=false", "train.keep=last"]
    one = fit_in(tmp_path / "one", image_options, batch=8, steps=3, set=still)
    many = fit_in(
        tmp_path / "many", image_options, batch=2, steps=3, set=[*still, "train.accumulate=4"]
    )
    a = load_file(one.path / "model" / "delta.safetensors")
    b = load_file(many.path / "model" / "delta.safetensors")
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=name)


def test_every_step_of_an_epoch_sees_every_example_once():
    schedule = Schedule(examples=23, batch=2, accumulate=2, seed=0, world=2)
    seen = [i for step in range(schedule.steps_per_epoch) for i in schedule.members(step)]
    assert sorted(seen) == list(range(23))
    assert schedule.steps_per_epoch == 3
    for step in range(6):
        shares = [i for rank in (0, 1) for part in schedule.parts(step, rank) for i in part]
        assert sorted(shares) == sorted(schedule.members(step))
    assert list(schedule.members(0)) != list(schedule.members(3))


def test_early_stopping_and_best_weights(tmp_path, image_options):
    sets = ["train.eval_every=1", "train.patience=2", "optim.lr=1e-9", "optim.schedule=constant"]
    run = fit_in(tmp_path / "run", image_options, steps=50, set=sets)
    assert run.summary["steps"] == 3 and run.summary["best_step"] == 1


def test_class_weights_move_the_predictions(tmp_path, image_options):
    run = fit_in(
        tmp_path / "run", image_options, method="probe", steps=30, lr=1e-2,
        set=["train.class_weights=[0,0,1]", "train.keep=last"],
    )  # fmt: skip
    split = run.load_evaluation()["validation"]
    assert run.summary["metrics"]["deployed"]["accuracy"] == pytest.approx(
        (split.labels == 2).mean()
    )
    with pytest.raises(UserError, match="has 2 values, but there are 3 classes"):
        fit_in(tmp_path / "bad", image_options, set=["train.class_weights=[1,1]"])


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_augmentation_changes_training_and_is_repeatable(tmp_path, image_options, augment):
    sets = [f"data.augment={augment}", "data.workers=1"]
    runs = [fit_in(tmp_path / str(i), image_options, steps=2, set=sets) for i in range(2)]
    plain = fit_in(tmp_path / "plain", image_options, steps=2)
    deltas = [(run.path / "model" / "delta.safetensors").read_bytes() for run in (*runs, plain)]
    assert deltas[0] == deltas[1] != deltas[2]


def test_bf16_and_random_backbones_train_and_reload(tmp_path, image_options):
    run = fit_in(
        tmp_path / "run", image_options, steps=3,
        set=["train.precision=bf16", "backbone.pretrained=false"],
    )  # fmt: skip
    assert (run.path / "model" / "backbone.safetensors").is_file()
    assert (
        Run.open(run.path).load_deployed().backbone.source.sha256
        == run.summary["backbone"]["sha256"]
    )


def test_a_backbone_that_changed_since_is_refused(tmp_path, image_options, tiny_vit):
    import shutil

    own = tmp_path / "backbone"
    shutil.copytree(tiny_vit, own)
    run = fit_in(tmp_path / "run", {**image_options, "backbone": own}, steps=1)
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (own / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(UserError, match="has changed since the run"):
        Run.open(run.path).load_deployed()


def test_divergence_stops_the_run_with_the_mend(tmp_path, text_options):
    from mdpd_deploy.errors import WorkFailed

    with pytest.raises(WorkFailed, match=r"diverged. Lower optim.lr"):
        fit_in(
            tmp_path / "run", text_options, steps=60, lr=1e30,
            set=["optim.clip=null", "optim.warmup=0", "train.eval_every=60"],
        )  # fmt: skip
    assert not (tmp_path / "run" / "summary.json").exists()


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
def test_bad_words_are_one_sentence_and_leave_nothing(tmp_path, image_options, words, message):
    if words.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        fit_in(tmp_path / "run", image_options, **words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_backbone_of_the_wrong_modality_is_refused(tmp_path, image_options, tiny_bert):
    with pytest.raises(
        UserError, match=r"works on images, but --backbone .* takes texts: name one"
    ):
        fit_in(
            tmp_path / "run", {**image_options, "backbone": tiny_bert}, set=["data.max_length=24"]
        )


def test_a_full_folder_is_refused_and_overwrite_replaces_it(tmp_path, image_options):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: choose another folder or add --overwrite"):
        fit_in(out, image_options)
    (out / "model").mkdir()
    with pytest.raises(
        UserError, match="did not write, and --overwrite replaces only what it wrote"
    ):
        fit_in(out, image_options, overwrite=True)
    assert (out / "model").is_dir()
    fit_in(tmp_path / "own", image_options, steps=2)
    (tmp_path / "own" / "notes.txt").write_text("mine")
    run = fit_in(tmp_path / "own", image_options, steps=1, overwrite=True)
    assert run.summary["steps"] == 1
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"


def test_a_plan_counts_without_training(image_options):
    made = plan(**image_options)
    assert made.examples["train"] == 36 and made.steps == 6 and made.steps_per_epoch == 5
    assert made.params["trained"] == sum(made.params[k] for k in ("side", "norms", "head"))
    assert made.forecast_bytes > 0


def test_a_config_file_flags_and_sets_merge_in_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lr: 1e-4\n  warmup: 0.2\ntrain: {batch: 4}\n")
    config = load_config(file, {"train.batch": 8}, ["optim.warmup=0.3"])
    assert (config.optim.lr, config.optim.warmup, config.train.batch) == (1e-4, 0.3, 8)
    written = tmp_path / "w.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config


def test_newest_run_is_found_and_named(tmp_path, monkeypatch, tiny_run):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no completed run under runs/"):
        Run.open()
    Path("runs").mkdir()
    Path("runs/a").symlink_to(tiny_run.path)
    assert Run.open().path == Path("runs/a")
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(tmp_path)


def test_a_tracker_gets_the_numbers_or_its_absence_is_named(tmp_path, image_options):
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


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(tmp_path, image_options):
    """A limit on file sizes stands in for a full disk: the checkpoint does not fit."""
    import shlex

    out = tmp_path / "run"
    words = ["train", "--task", "classify", "--data", image_options["data"], "--backbone"]
    words += [image_options["backbone"], "--steps", "4", "--batch", "8", "--out", out]
    line = f"ulimit -f 30; {shlex.join(command(*words))}"
    full = subprocess.run(["bash", "-c", line], check=False, capture_output=True, timeout=300)
    assert full.returncode == 1
    assert b"could not write" in full.stderr and b"Free some space" in full.stderr
    assert b"Traceback" not in full.stderr
    assert not list(out.glob("checkpoints/*")) and not (out / "model").exists()
    assert fit(resume=out, quiet=True).summary["status"] == "completed"


def test_balanced_weights_train_and_a_class_without_examples_has_a_finite_one(
    tmp_path, text_options
):
    options = {**text_options, "steps": 2}
    run = fit_in(tmp_path / "run", options, set=["train.class_weights=balanced"])
    assert run.summary["status"] == "completed"
    with pytest.raises(UserError, match=r"train\.class_weights"):
        fit_in(tmp_path / "bad", options, set=["train.class_weights=[-1,1]"])


def test_two_trainings_never_share_a_folder(tmp_path, image_options):
    """The second one is refused while the first one holds the folder, also for a resume."""
    out = tmp_path / "run"
    with claimed(out), pytest.raises(UserError, match="another training is writing to"):
        fit_in(out, image_options, overwrite=True)
    assert not list(out.iterdir())
    fit_in(out, image_options, steps=1)
    assert ".lock" not in {path.name for path in out.iterdir()}


def test_a_process_without_a_share_of_the_last_step_adds_zeros(tiny_vit, digit_folder):
    config = load_config(
        None,
        {
            "task": "classify", "data.path": str(digit_folder), "backbone.name": str(tiny_vit),
            "train.batch": 35,
        },
    )  # fmt: skip
    setup = prepare(config)
    schedule = Schedule(36, 35, 1, 0, world=2)
    assert [len(schedule.parts(0, rank)) for rank in (0, 1)] == [1, 1]
    optimizer = build_optimizer(setup.method)
    losses, _ = one_step(setup, optimizer, [], 0)
    assert set(losses) == set(setup.method.loss_names)
    assert all(float(value) == 0 for value in losses.values())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prefix"}))
def test_a_step_returns_the_losses_it_names(method, tiny_vit, digit_folder):
    flags = {"task": "classify", "data.path": str(digit_folder), "backbone.name": str(tiny_vit)}
    setup = prepare(load_config(None, {**flags, "method": method}))
    dataset = StepDataset(
        setup.data.train, setup.backbone.preprocess, setup.task, setup.config, setup.schedule
    )
    assert set(setup.method.step(dataset[0][0])) == set(setup.method.loss_names)


def test_a_run_that_stopped_early_stays_stopped_when_resumed(tmp_path, image_options):
    """Killed between its last evaluation and its summary, it must not train on."""
    sets = ["train.patience=1", "train.eval_every=1", "optim.lr=1e-9", "train.keep=last"]
    whole = fit_in(tmp_path / "whole", image_options, set=sets)
    stopped = whole.summary["steps"]
    assert stopped < image_options["steps"]
    cut = tmp_path / "cut"
    shutil.copytree(whole.path, cut)
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    (cut / ".model.1.tmp").mkdir()
    run = fit(resume=cut, quiet=True)
    assert run.summary["steps"] == stopped and not (cut / ".model.1.tmp").exists()
    for name in ("delta.safetensors", "side.safetensors"):
        assert (cut / "model" / name).read_bytes() == (whole.path / "model" / name).read_bytes()


def test_a_resume_on_other_examples_is_refused(tmp_path, text_options, sentence_folder):
    data = tmp_path / "data"
    shutil.copytree(sentence_folder, data)
    whole = fit_in(tmp_path / "run", text_options, data=data, steps=3, set=["checkpoint.every=1"])
    (whole.path / "summary.json").unlink()
    lines = (data / "train.csv").read_text().splitlines()
    (data / "train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    with pytest.raises(UserError, match=r"are not the examples that checkpoint .* was trained on"):
        fit(resume=whole.path, quiet=True)


@pytest.mark.parametrize("file", ["delta.safetensors", "side.safetensors", "labels.json"])
def test_a_damaged_model_file_is_noticed(tmp_path, tiny_run, file):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run.path, copy, ignore=shutil.ignore_patterns("checkpoints", "bundles"))
    raw = bytearray((copy / "model" / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "model" / file).write_bytes(raw)
    with pytest.raises(UserError, match=rf"{file} is damaged \(its SHA-256 differs\)"):
        Run.open(copy).load_with_side()


def test_pictures_that_training_skipped_are_skipped_afterwards(
    tmp_path, image_options, digit_folder
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
    made = plan(**{**image_options, "data": "~/my pics"})
    assert made.examples["train"] == 36


def test_a_path_may_hold_what_a_config_would_interpolate(tmp_path, text_options, sentence_folder):
    data = tmp_path / "a${b}"
    shutil.copytree(sentence_folder, data)
    run = fit_in(tmp_path / "run", text_options, data=data, steps=1)
    assert Run.open(run.path).config.data.path == str(data)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("norms", "side.name=sherl"), ("probe", "train.norm_grad=full"), ("side", "loss.logits=1"),
        ("side", "optim.head_lr=1e-3"), ("norms", "train.student_task_weight=0"),
        ("probe", "distill.mask_ratio=0.1"), ("mdpd", "data.max_length=64"),
        ("mdpd", "peft.rank=4"), ("prompt", "peft.rank=4"), ("ia3", "peft.targets=all"),
        ("lora", "peft.tokens=5"),
    ],
)  # fmt: skip
def test_an_option_that_the_method_would_ignore_is_refused(method, option, image_options):
    with pytest.raises(UserError, match=option.split("=")[0].replace(".", r"\.")):
        plan(**image_options, method=method, set=[option])


def test_resume_and_a_dry_run_exclude_each_other(capsys):
    assert main(["train", "--resume", "nowhere", "--dry-run"]) == 2
    assert "leave --resume out" in capsys.readouterr().err


def test_training_time_counts_the_wait_for_data(tmp_path, text_options, monkeypatch):
    from mdpd_deploy.train import batches

    plain = batches.to_tensors

    def slow(*arguments):
        time.sleep(0.1)
        return plain(*arguments)

    monkeypatch.setattr(batches, "to_tensors", slow)
    run = fit_in(tmp_path / "run", text_options, steps=6)
    assert run.summary["time"]["train_s"] > 4 * 0.1


def test_the_summary_says_what_no_learning_at_all_scores(tiny_text_run):
    validation = tiny_text_run.load_evaluation()["validation"].labels
    train = tiny_text_run.load_task_data().train.labels
    most = np.bincount(train).argmax()
    assert tiny_text_run.summary["majority"]["accuracy"] == (validation == most).mean()
    report = (tiny_text_run.path / "report.html").read_text()
    assert "always answering the most frequent class" in report
