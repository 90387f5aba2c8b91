"""Single calls of the system that fail while a verb writes: one sentence, and nothing half-written.

`benchmarks/faults.py` fails every call in turn; here is a sample of each kind.
"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks/faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(faults, tmp_path_factory):
    """What training is tried on, and how often it calls the system."""
    folder = tmp_path_factory.mktemp("faults")
    backbone, pictures, _ = faults.write_inputs(folder)
    trial = faults.train_trial(backbone, pictures)
    trouble, calls = faults.attempt(trial, folder / "count", None, 0)
    assert trouble is None
    return trial, calls, folder / "work"


# Shares of the calls of a kind: an early one, one in the middle, the last.
@pytest.mark.parametrize(
    ("kind", "share"),
    [("open", 0.5), ("write", 0.1), ("write", 1.0), ("tensors", 0.5), ("fsync", 0.7),
     ("rename", 0.6), ("mkdir", 1.0), ("fork", 1.0)],
)  # fmt: skip
def test_training(faults, trained, kind, share):
    trial, calls, work = trained
    assert calls[kind] >= 1
    nth = max(1, round(share * calls[kind]))
    assert faults.attempt(trial, work, kind, nth)[0] is None


@pytest.mark.parametrize(("kind", "nth"), [("write", 3), ("tensors", 1), ("rename", 1)])
def test_export(faults, tiny_run, tmp_path, kind, nth):
    trial = faults.export_trial(tiny_run.path)
    assert faults.attempt(trial, tmp_path / "work", kind, nth)[0] is None


@pytest.mark.parametrize(
    ("kind", "nth"), [("open", 2), ("open", 5), ("write", 1), ("fsync", 1), ("rename", 1)]
)
def test_signing(faults, tiny_bundle, keys, tmp_path, kind, nth):
    trial = faults.sign_trial(tiny_bundle.path, keys / "private.pem")
    assert faults.attempt(trial, tmp_path / "work", kind, nth)[0] is None
