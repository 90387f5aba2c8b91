"""`train.memory` and `train.norm_grad=auto`: what is chosen, what is refused, and where it is said."""

import json

import pytest
import torch

from mdpd_deploy import machine
from mdpd_deploy.artifacts.run import Run, read_metrics
from mdpd_deploy.cli import main
from mdpd_deploy.commands.train import fit, plan
from mdpd_deploy.config import check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train import forecast_methods
from mdpd_deploy.train.memory import choice
from mdpd_deploy.train.memory.choice import free_bytes, settle_memory
from mdpd_deploy.train.memory.forecast import forecast, reason_against

WAYS = [(mode, precision) for precision in ("fp32", "bf16")
        for mode in ("full", "recompute", "recompute-halves")]  # fmt: skip


def config_of(folder, method="norms", **train):
    return check_config(
        {
            "method": method,
            "backbone": {"name": str(folder), "pretrained": False},
            "train": {"batch": 16, **train},
        }
    )


def settled(config, free=10**12):
    return settle_memory(config, Classify.numbered(3), text_length=None, free=free)


def need(folder, mode, precision, **more):
    config = config_of(folder, norm_grad=mode, precision=precision, **more)
    return forecast(config, Classify.numbered(3)).peak_bytes


def test_the_fastest_way_that_fits_is_taken(tiny_vit):
    needs = {way: need(tiny_vit, *way) for way in WAYS}
    assert max(needs.values()) == needs["full", "fp32"]
    assert needs["recompute-halves", "fp32"] < needs["recompute", "fp32"]
    for limit in sorted(needs.values()):
        fitting = next(way for way in WAYS if needs[way] <= limit)
        found = settled(config_of(tiny_vit, norm_grad="auto"), limit)
        assert (found.config.train.norm_grad, found.config.train.precision) == fitting
        assert found.forecast.peak_bytes == needs[fitting]
        tried = WAYS[: WAYS.index(fitting) + 1]
        assert found.choice.forecast_bytes == {f"{m} in {p}": needs[m, p] for m, p in tried}
    only = settled(config_of(tiny_vit, norm_grad="auto", precision="bf16"))
    assert (only.config.train.norm_grad, only.config.train.precision) == ("full", "bf16")
    with pytest.raises(UserError, match="recompute-halves in fp32, the least of all ways"):
        settled(config_of(tiny_vit, norm_grad="auto", precision="fp32"), min(needs.values()))


@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_a_run_that_does_not_fit_names_the_largest_batch_that_does(tiny_vit, mode):
    least = ("recompute-halves", "bf16") if mode == "auto" else (mode, "fp32")
    limit = need(tiny_vit, *least, batch=5)
    assert need(tiny_vit, *least, batch=6) > limit
    memory = f"{limit / 1e3}kB"
    with pytest.raises(UserError, match=r"train\.batch=5 is the largest that fits"):
        settled(config_of(tiny_vit, norm_grad=mode, memory=memory))
    assert settled(config_of(tiny_vit, norm_grad=mode, memory=memory, batch=5)).forecast
    with pytest.raises(UserError, match=r"not even train\.batch=1 fits"):
        settled(config_of(tiny_vit, norm_grad=mode, memory="1kB"))


def test_every_method_can_be_held_to_a_limit(tiny_vit):
    assert settled(config_of(tiny_vit, "probe", memory="1GB")).choice is None
    with pytest.raises(UserError, match=r"train\.batch=16 needs .* more than train\.memory"):
        settled(config_of(tiny_vit, "full", memory="100kB"))
    assert settled(config_of(tiny_vit, "full"), free=0).choice is None


def test_without_halves_the_next_way_is_looked_at():
    name = {"name": "timm:resnet18", "pretrained": False, "img_size": 64}
    config = {"method": "norms", "backbone": name, "train": {"batch": 8, "norm_grad": "auto"}}
    recompute = settled(check_config(config)).choice.forecast_bytes["full in fp32"] - 1
    found = settled(check_config(config), recompute)
    assert found.config.train.norm_grad == "recompute"
    bare = found.forecast.peak_bytes - 1
    assert settled(check_config(config), bare).config.train.precision == "bf16"
    config["train"] = {"norm_grad": "recompute-halves"}
    with pytest.raises(UserError, match=r"no block of the backbone has two parts .* use recompute"):
        settled(check_config(config))


@pytest.mark.parametrize(
    ("name", "most"),
    [("timm:swin_base_patch4_window7_224", 1.45e9), ("timm:vit_base_patch16_224", 0.92e9)],
)
def test_halves_need_less_than_whole_blocks(name, most):
    backbone = {"name": name, "pretrained": False}

    def peak(mode):
        train = {"batch": 32, "norm_grad": mode}
        config = check_config({"method": "norms", "backbone": backbone, "train": train})
        return forecast(config, Classify.numbered(100)).peak_bytes

    assert peak("recompute-halves") < min(most, 0.95 * peak("recompute"))


def test_auto_takes_the_largest_batch_that_fits_and_keeps_the_step(tiny_vit):
    """Every batch that divides a step of 12 is tried by hand, each with its accumulation."""
    sizes = [1, 2, 3, 4, 6, 12]
    needs = [need(tiny_vit, "full", "fp32", batch=b, accumulate=12 // b) for b in sizes]
    assert needs == sorted(set(needs))
    for limit in (needs[0], needs[2] + 1, needs[4] - 1, needs[-1]):
        memory = f"{limit / 1e3}kB"
        found = settled(config_of(tiny_vit, norm_grad="full", batch="auto:12", memory=memory))
        batch = max(b for b, bytes_ in zip(sizes, needs, strict=True) if bytes_ <= limit)
        train = found.config.train
        assert (train.batch, train.accumulate) == (batch, 12 // batch) == (
            found.choice.batch, found.choice.accumulate
        )  # fmt: skip
        assert found.forecast.peak_bytes == needs[sizes.index(batch)]
        assert f"{batch} of a step's 12 examples at a time within" in found.choice.words
    with pytest.raises(UserError, match=r"not even train\.batch=1 fits"):
        settled(config_of(tiny_vit, norm_grad="full", batch="auto:12", memory="1kB"))


def test_batch_and_way_are_settled_together(tiny_vit):
    """The largest batch first, then the fastest way at it; bf16 only where nothing else fits."""
    both = {"norm_grad": "auto", "batch": "auto"}
    whole = {way: need(tiny_vit, *way, batch=32) for way in WAYS}
    found = settled(config_of(tiny_vit, **both), whole["recompute", "fp32"])
    assert (found.config.train.batch, found.config.train.norm_grad) == (32, "recompute")
    limit = whole["recompute-halves", "fp32"] - 1
    assert limit > whole["recompute-halves", "bf16"]
    found = settled(config_of(tiny_vit, **both), limit)
    train = found.config.train
    assert (train.batch, train.accumulate, train.precision) == (16, 2, "fp32")
    faster = WAYS[: [mode for mode, _ in WAYS].index(train.norm_grad)]
    parts = [need(tiny_vit, *way, batch=16, accumulate=2) for way in faster]
    assert found.forecast.peak_bytes <= limit < min(parts, default=limit + 1)
    alone = [need(tiny_vit, *way, batch=1, accumulate=32) for way in WAYS]
    found = settled(config_of(tiny_vit, **both), min(alone[:3]) - 1)
    assert found.config.train.precision == "bf16"


def test_a_run_with_an_automatic_batch_takes_the_steps_of_the_whole_one(
    tmp_path, image_options, capsys
):
    words = {**image_options, "method": "norms", "steps": 3}
    del words["batch"]
    least = plan(**words, batch=2, set=["train.accumulate=4"]).forecast_bytes
    memory = f"train.memory={least / 1e3}kB"
    made = plan(**words, batch="auto:8", set=[memory])
    assert (made.batch, made.memory_choice.batch) == (
        8,
        2,
    ) and made.memory_choice.words in made.notes
    run = fit(**words, batch="auto:8", set=[memory], out=tmp_path / "parts")
    assert made.memory_choice.words in capsys.readouterr().err
    assert (run.config.train.batch, run.config.train.accumulate) == (2, 4)
    whole = fit(**words, batch=8, out=tmp_path / "whole", quiet=True)
    lines = [
        [
            line["loss"]
            for line in read_metrics(r.path / "metrics.jsonl")
            if line["split"] == "train"
        ]
        for r in (run, whole)
    ]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"batch": "auto:0"}, "a whole number of examples from 1 on, auto, or auto:N"),
        ({"batch": "many"}, "a whole number of examples from 1 on, auto, or auto:N"),
        ({"batch": 0}, "a whole number of examples from 1 on, auto, or auto:N"),
        ({"batch": "auto", "accumulate": 2}, r"train\.batch=auto settles train\.accumulate itself"),
    ],
)
def test_a_batch_that_means_nothing_is_refused(train, said):
    with pytest.raises(UserError, match=said):
        check_config({"train": train})
    assert check_config({"train": {"batch": "8"}}).train.batch == 8


@pytest.mark.parametrize("memory", ["4", "4 apples", "-1GB", "nanGB", "GB", 4, "1e3GB"])
def test_a_size_without_a_unit_is_refused(memory):
    with pytest.raises(UserError, match=r"option train\.memory: .*e\.g\. 4GB or 500MiB"):
        check_config({"train": {"memory": memory}})


def test_sizes_have_the_units_of_their_names():
    def size(text):
        return check_config({"train": {"memory": text}}).train.memory_bytes

    assert [size("4GB"), size("1.5 GB"), size("500MiB")] == [4 * 10**9, 15 * 10**8, 500 * 2**20]
    assert "memory" not in check_config({}).to_yaml()  # older checkpoints know their config


def test_the_choice_is_said_by_plan_progress_and_summary(tmp_path, image_options, capsys):
    words = {**image_options, "method": "norms", "steps": 2, "set": ["train.norm_grad=auto"]}
    full = plan(**words).forecast_bytes
    words["set"] = ["train.norm_grad=auto", f"train.memory={(full - 1) / 1e3}kB"]
    made = plan(**words)
    assert (made.norm_grad, made.precision) == ("recompute", "fp32")
    assert made.memory_choice.words in made.notes
    assert "full in fp32 needs" in made.memory_choice.words
    run = fit(**words, out=tmp_path / "run")
    assert made.memory_choice.words in capsys.readouterr().err
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert (memory["norm_grad"], memory["precision"]) == ("recompute", "fp32")
    assert memory["choice"]["limit_bytes"] == round(full - 1)
    assert memory["choice"]["words"] in run.summary["notes"]
    assert memory["peak_live_bytes"] == pytest.approx(made.forecast_bytes, rel=0.02)
    assert Run.open(tmp_path / "run").config.train.norm_grad == "recompute"
    again = fit(tmp_path / "run" / "config.yaml", out=tmp_path / "again", quiet=True)
    assert again.summary["metrics"] == run.summary["metrics"]


def test_a_command_refuses_in_a_sentence(image_options, capsys):
    words = [f"--{name}={value}" for name, value in image_options.items()]
    assert main(["train", *words, "--dry-run", "--set", "train.memory=600kB"]) == 2
    said = capsys.readouterr().err
    assert "more than train.memory, 600.00 kB" in said and "Traceback" not in said
    assert main(["train", *words, "--method=probe", "--set", "train.norm_grad=auto"]) == 2
    assert "train.norm_grad=auto does nothing with --method probe" in capsys.readouterr().err


def test_tables_and_reasons_know_auto(tiny_vit):
    config = config_of(tiny_vit, norm_grad="auto", memory="1GB")
    assert reason_against(config) is None
    (row,) = forecast_methods({"norms": config}, Classify.numbered(3))
    assert row.forecast.peak_bytes == need(tiny_vit, "full", "fp32")


def test_a_process_may_need_its_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(choice, "free_memory_bytes", lambda: 1000)
    assert (free_bytes("cpu"), free_bytes("cpu", 2)) == (800, 400)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (700, 900))
    assert (free_bytes("auto", 2), free_bytes("cpu")) == (700, 800)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    whole = machine.free_memory_bytes()
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert machine.free_memory_bytes() == 2000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory_bytes() > 2000
