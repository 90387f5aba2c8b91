"""Runs that were killed, cut short, damaged or asked for twice: resumed exactly, or refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mdpd_deploy import fit
from mdpd_deploy.artifacts.folders import claimed
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.cli import main
from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.train.checkpoint import load_best
from mdpd_deploy.train.stopping import stop_requests


def wait_for(condition, process, seconds=240):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_kill_9_then_resume_is_bit_identical(tmp_path, tiny_bert, sentence_folder):
    words = dict(
        task="classify", data=sentence_folder, text="sentence", backbone=tiny_bert, side="sherl",
        steps=80, batch=8,
    )  # fmt: skip
    sets = ["side.reduction=2", "data.max_length=24", "checkpoint.every=1", "train.eval_every=20"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    flags += [word for line in sets for word in ("--set", line)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mdpd_deploy", "train", *map(str, flags), "--out", killed],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: any(killed.glob("checkpoints/step-000000[1-9]*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model").exists() and not (killed / "summary.json").exists()
    with pytest.raises(UserError, match=r"is not finished: `mdpd train --resume"):
        Run.open(killed)
    done = [int(p.name[5:]) for p in killed.glob("checkpoints/step-*")]
    assert 0 < max(done) < 80
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process had: sums in another order are other sums
    try:
        assert main(["train", "--resume", str(killed)]) == 0
        fit(out=whole, set=sets, quiet=True, **words)
    finally:
        torch.set_num_threads(threads)
    for file in ("delta.safetensors", "side.safetensors"):
        assert (killed / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [20, 40, 60, 80]
    assert Run.open(killed).summary["metrics"] == Run.open(whole).summary["metrics"]


def test_resuming_a_completed_run_changes_nothing(tiny_run):
    before = (tiny_run.path / "summary.json").stat().st_mtime_ns
    assert fit(resume=tiny_run.path, quiet=True).summary == tiny_run.summary
    assert (tiny_run.path / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="give no other option"):
        fit(resume=tiny_run.path, lr=1.0)


def interrupted(fit_in, tmp_path, options, keep=2):
    """A run that stopped after its last checkpoint, before it was finished; with the newest one."""
    run = fit_in(tmp_path / "run", options, set=["checkpoint.every=2", "train.eval_every=2"])
    (run.path / "summary.json").unlink()
    shutil.move(run.path / "model", tmp_path / "whole")
    *older, newest = sorted(run.path.glob("checkpoints/step-*"))
    for checkpoint in older[: len(older) + 1 - keep]:
        shutil.rmtree(checkpoint)
    return run.path, newest


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, image_options, fit_in):
    path, checkpoint = interrupted(fit_in, tmp_path, image_options, keep=1)
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


def test_early_stopping_and_best_weights(tmp_path, image_options, fit_in):
    sets = ["train.eval_every=1", "train.patience=2", "optim.lr=1e-9", "optim.schedule=constant"]
    run = fit_in(tmp_path / "run", image_options, steps=50, set=sets)
    assert run.summary["steps"] == 3 and run.summary["best_step"] == 1


def test_a_backbone_that_changed_since_is_refused(tmp_path, image_options, tiny_vit, fit_in):
    own = tmp_path / "backbone"
    shutil.copytree(tiny_vit, own)
    run = fit_in(tmp_path / "run", {**image_options, "backbone": own}, steps=1)
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (own / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(UserError, match="has changed since the run"):
        Run.open(run.path).load_deployed()


def test_a_full_folder_is_refused_and_overwrite_replaces_it(tmp_path, image_options, fit_in):
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


def test_newest_run_is_found_and_named(tmp_path, monkeypatch, tiny_run):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no completed run under runs/"):
        Run.open()
    Path("runs").mkdir()
    Path("runs/a").symlink_to(tiny_run.path)
    assert Run.open().path == Path("runs/a")
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(tmp_path)


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(tmp_path, image_options, capsys):
    """A limit on file sizes stands in for a full disk: the checkpoint does not fit."""
    out = tmp_path / "run"
    words = ["train", "--task", "classify", "--data", image_options["data"], "--backbone"]
    words += [image_options["backbone"], "--steps", "4", "--batch", "8", "--out", out]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = main(list(map(str, words)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert code == 1
    assert "could not write" in said and "Free some space" in said
    assert "Traceback" not in said
    assert not list(out.glob("checkpoints/*")) and not (out / "model").exists()
    assert fit(resume=out, quiet=True).summary["status"] == "completed"


def test_two_trainings_never_share_a_folder(tmp_path, image_options, fit_in):
    """The second one is refused while the first one holds the folder, also for a resume."""
    out = tmp_path / "run"
    with claimed(out), pytest.raises(UserError, match="another training is writing to"):
        fit_in(out, image_options, overwrite=True)
    assert not list(out.iterdir())
    fit_in(out, image_options, steps=1)
    assert ".lock" not in {path.name for path in out.iterdir()}


def test_a_run_that_stopped_early_stays_stopped_when_resumed(tmp_path, image_options, fit_in):
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


def test_a_resume_on_other_examples_is_refused(tmp_path, text_options, sentence_folder, fit_in):
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


def test_resume_and_a_dry_run_exclude_each_other(capsys):
    assert main(["train", "--resume", "nowhere", "--dry-run"]) == 2
    assert "leave --resume out" in capsys.readouterr().err


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(tmp_path, image_options, fit_in):
    """`"step": 4` is one bit away from `"step": 5`: a whole other model, and sound JSON."""
    path, newest = interrupted(fit_in, tmp_path, image_options, keep=1)
    file = newest / "state.json"
    good = file.read_bytes()
    place = good.index(b'"step": 4') + len(b'"step": ')
    file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    with pytest.raises(UserError, match=r"the SHA-256 of state.json differs\); delete .* to start"):
        fit(resume=path, quiet=True)
    state = json.loads(good)
    for lost in ("config", "data", "sha256", "progress", "digest"):
        file.write_text(json.dumps({k: v for k, v in state.items() if k != lost}))
        with pytest.raises(UserError, match=rf"is damaged \(state.json and '{lost}'\); delete"):
            fit(resume=path, quiet=True)
    del state["progress"]["best"]
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"is damaged \(state.json and 'best'\); delete"):
        fit(resume=path, quiet=True)
    file.write_bytes(good)
    best = path / "checkpoints" / "best.safetensors"
    raw = bytearray(best.read_bytes())
    raw[-1] ^= 1
    best.write_bytes(raw)
    with pytest.raises(UserError, match=r"best.safetensors is damaged .*its SHA-256 differs"):
        load_best(best.parent, None)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path, image_options, fit_in, capsys
):
    path, newest = interrupted(fit_in, tmp_path, image_options)
    found = sorted(p.name for p in newest.parent.glob("step-*"))
    assert found == ["step-00000002", "step-00000004"]
    (newest / "state.safetensors").write_bytes(b"")
    fit(resume=path)
    said = capsys.readouterr().err
    assert "step-00000004 is damaged" in said and "going on from step-00000002" in said
    for file in ("delta.safetensors", "side.safetensors"):
        assert (path / "model" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_makes_a_checkpoint_and_says_how_to_go_on(
    number, code, word, tmp_path, image_options
):
    out = tmp_path / "run"
    flags = [w for k, v in image_options.items() for w in (f"--{k}", str(v))]
    flags += ["--steps", "5000", "--set", "train.eval_every=5000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mdpd_deploy", "train", *flags, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log = out / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 1, process)
    process.send_signal(number)
    printed, said = (text.decode() for text in process.communicate(timeout=120))
    assert (process.returncode, printed) == (code, ""), said
    assert said.splitlines()[-2:] == [
        f"stopped: `mdpd train --resume {out}` goes on from its last checkpoint", word,
    ]  # fmt: skip
    (checkpoint,) = out.glob("checkpoints/step-*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert 10 <= state["progress"]["step"] == int(checkpoint.name[5:]) < 5000


def test_signals_of_the_caller_are_obeyed_and_put_back(tmp_path, image_options, fit_in):
    """A handler of the caller's is called after the step, and may let the training go on."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    own = signal.getsignal(signal.SIGTERM)
    try:
        with stop_requests() as stop, stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.came == signal.SIGTERM and not came
            os.kill(os.getpid(), signal.SIGTERM)  # a second one waits no more
            assert came == [signal.SIGTERM]
            stop.obey()
            assert len(came) == 2
        assert signal.getsignal(signal.SIGTERM) is own
        interrupt = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_a_thread_works_without_signals(tmp_path, image_options, fit_in):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(fit_in, tmp_path / "run", image_options, steps=2).result()
    assert run.summary["status"] == "completed"


def test_a_run_folder_that_is_deleted_while_training_is_a_failure(tmp_path, image_options, fit_in):
    out = tmp_path / "run"

    started = Path.open

    def open_and_delete(path, *args, **kwargs):
        stream = started(path, *args, **kwargs)
        if path.name == "metrics.jsonl" and args[:1] == ("a",):
            shutil.rmtree(out)
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_and_delete)
        with pytest.raises(WorkFailed, match="was deleted or moved while training"):
            fit_in(out, image_options, set=["train.eval_every=2"])
    assert not list(out.rglob("*.safetensors")) and not (out / "summary.json").exists()
