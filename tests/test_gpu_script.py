"""The measurement on a card, run on the CPU: its rows, their resumption, and what it refuses."""

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = [
    "--device", "cpu", "--small", "--shapes", "vit", "--methods", "probe",
    "--runtimes", "eager", "--rivals", "bare",
]  # fmt: skip
SHORT = ["--steps", "3", "--seconds", "0.05", "--openings", "3", "--batches", "2"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def run(gpu, monkeypatch, capsys):
    """Run the command in this process (its rows in theirs); return the file and what it prints."""

    def run(out, *words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--out", str(out)])
        gpu.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_a_row_a_cell_and_going_on(run, tmp_path):
    out = tmp_path / "gpu.json"
    content, printed = run(out, *SMALL, *SHORT)
    (row,) = content["training"]
    assert (row["shape"], row["precision"], row["method"]) == ("vit", "fp32", "probe")
    assert row["reason"] is None
    assert row["trained"] == 100 * 64 + 100  # a linear head by hand
    assert row["ratio"] == row["live_bytes"] / row["forecast_bytes"]
    assert row["ratio"] == pytest.approx(1, rel=0.02)
    assert row["allocated_bytes"] is None
    low, high = row["ci95_ms"]
    assert 0 < low <= row["step_ms"] <= high

    (cell,) = content["latency"]
    assert (cell["runtime"], cell["batch"], cell["size"]) == ("eager", 2, "3x32x32")
    assert (cell["reason"], cell["failed"]) == (None, {})
    assert sum(cell["openings"]) == cell["rounds"]
    assert len(cell["openings"]) == 3
    assert list(cell["variants"]) == ["deployed", "deployed (A/A)", "bare"]
    control = cell["variants"]["deployed (A/A)"]["wall"]
    assert control["verdict"] == "control"
    assert control["ci95"][0] <= control["ratio"] <= control["ci95"][1]
    assert cell["variants"]["bare"]["device"] is None
    assert "| `probe` | 6,500 |" in printed
    assert "| `deployed (A/A)` |" in printed

    # what is there stays
    words = [word if word != "probe" else "probe,mdpd:unipt" for word in SMALL]
    again, _ = run(out, *words, *SHORT, "--parts", "training")
    assert again["training"][0] == row
    assert [found["method"] for found in again["training"]] == ["probe", "mdpd:unipt"]
    assert again["latency"] == content["latency"]
    shown = run(out, "--show")[1]
    assert "`mdpd:unipt`" in shown

    with pytest.raises(SystemExit, match="was measured with steps 3, not 4"):
        run(out, *SMALL, *SHORT, "--steps", "4")


def test_what_fails_has_a_reason(gpu, run, tmp_path):
    """A process that dies, one that raises, one that takes too long, a method that does not fit."""
    from apart import Failed, run_apart

    with pytest.raises(Failed, match="its process ended with exit code 3"):
        run_apart(os._exit, 3, limit_s=60)
    with pytest.raises(Failed, match="ValueError: math domain error"):
        run_apart(math.sqrt, -1.0, limit_s=60)
    with pytest.raises(Failed, match="took longer than 1 s"):
        run_apart(time.sleep, 60, limit_s=1)
    row = gpu.train_row(
        gpu.small_shapes(tmp_path)["vit"].__class__("tiny", str(tmp_path / "vit"), 3, 5),
        "fp32", "side:unipt", None,
    )  # fmt: skip
    assert row["reason"].startswith("it does not fit: side.reduction=3 does not fit")


def test_a_missing_card_is_one_sentence(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="--device cuda: PyTorch sees no CUDA device"):
        gpu.main()
    assert not (tmp_path / "gpu.json").exists()
