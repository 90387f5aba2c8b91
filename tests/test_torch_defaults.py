"""A caller's torch settings, as a notebook may have them: we work all the same and change none."""

import contextlib
import logging
import signal
import warnings

import pytest
import torch

from mdpd_deploy import export_run
from mdpd_deploy.commands.evaluate import evaluate_run


@contextlib.contextmanager
def no_gradients_and_odd_tensors():
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def inference_within_autocast():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield


def settings():
    """What a caller may rely on, ours or not."""
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "tensors": (torch.get_default_dtype(), torch.get_default_device()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "strict": torch.are_deterministic_algorithms_enabled(),
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "warnings": list(warnings.filters),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
    }


@pytest.mark.parametrize("around", [no_gradients_and_odd_tensors, inference_within_autocast])
def test_training_is_as_anywhere_and_leaves_the_callers_settings(
    around, tmp_path, image_options, fit_in, tiny_run
):
    with around():
        before = settings()
        run = fit_in(tmp_path / "run", image_options)
        assert settings() == before
    for file in ("delta.safetensors", "side.safetensors"):
        found = (run.path / "model" / file).read_bytes()
        assert found == (tiny_run.path / "model" / file).read_bytes()


def test_export_and_evaluation_too(tmp_path, tiny_run):
    with no_gradients_and_odd_tensors():
        before = settings()
        measured = evaluate_run(tiny_run.path, None, batch=8, device="cpu").metrics
        bundle = export_run(tiny_run.path, out=tmp_path / "bundle", metric_gate=False)
        assert settings() == before
    assert measured["validation"]["deployed"] == tiny_run.summary["metrics"]["deployed"]
    assert bundle.path.is_dir()
