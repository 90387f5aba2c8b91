"""`train.ema`: the mean of the weights is what is evaluated, kept and deployed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mdpd_deploy import fit
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.train import loop

SETS = ["train.ema=0.7", "optim.warmup=0", "backbone.dropout_active=false"]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_mean_by_its_formula_is_measured_and_deployed(
    tmp_path, image_options, fit_in, monkeypatch, keep
):
    states, measured, plain, look = [], [], loop.one_step, loop.evaluate

    def step(setup, *rest):
        if not states:
            states.append({k: t.clone() for k, t in setup.method.trained_state().items()})
        out = plain(setup, *rest)
        states.append({k: t.clone() for k, t in setup.method.trained_state().items()})
        return out

    def evaluate(setup, *rest):
        measured.append({k: t.clone() for k, t in setup.method.trained_state().items()})
        return look(setup, *rest)

    monkeypatch.setattr(loop, "one_step", step)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    sets = [*SETS, f"train.keep={keep}", "train.eval_every=6"]
    run = fit_in(tmp_path / "run", image_options, steps=6, set=sets)
    mean = dict(states[0])
    for state in states[1:]:
        mean = {k: 0.7 * mean[k] + 0.3 * t for k, t in state.items()}
    for name, tensor in measured[0].items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-7)
    deployed = load_file(run.path / "model" / "delta.safetensors")
    side = load_file(run.path / "model" / "side.safetensors")
    for name, tensor in (deployed | side).items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(deployed[name], states[-1][name]) for name in deployed)


def test_a_resumed_run_has_the_very_mean(tmp_path, image_options, fit_in):
    sets = [*SETS, "checkpoint.every=2", "train.keep=last"]
    run = fit_in(tmp_path / "run", image_options, set=sets)
    whole = (run.path / "model" / "delta.safetensors").read_bytes()
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.path / "model")
    shutil.rmtree(max(run.path.glob("checkpoints/step-*")))  # go on from step 2 of 6
    again = fit(resume=run.path, quiet=True)
    assert (again.path / "model" / "delta.safetensors").read_bytes() == whole


def test_the_forecast_counts_the_mean(image_options):
    options = {**image_options, "method": "full"}
    plain, with_mean = (plan(**options, set=sets) for sets in ([], ["train.ema=0.9"]))
    trained = 4 * plain.params["trained"]
    assert with_mean.forecast_parts["mean"] == trained
    assert with_mean.forecast_bytes - plain.forecast_bytes == pytest.approx(trained, rel=0.1)
    assert with_mean.options["train.ema"] == 0.9


@pytest.mark.parametrize("decay", [0, 1, 1.5])
def test_a_decay_is_between_0_and_1(decay):
    with pytest.raises(UserError, match=r"train\.ema"):
        check_config({"train": {"ema": decay}})
