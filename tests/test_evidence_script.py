"""The study of the open question: what it trains next, when it stops, and what its table says."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

METHODS = ["norms", "UniPT kept", "MDPD, felt"]


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import evidence

    yield evidence
    del sys.modules["evidence"]


@pytest.fixture
def study(evidence):
    """Runs the study on a made-up world where a rate of three times a method's own is best."""

    def run(noise, most):
        rng, lines = np.random.default_rng(0), []
        while len(lines) < most:
            todo = evidence.next_trainings(lines, ["count"], METHODS)
            if not todo:
                break
            setting, method, factor, seed = todo[0]
            score = 0.5 + 0.02 * METHODS.index(method) - 0.05 * abs(math.log(factor / 3))
            groups = (score + noise * rng.standard_normal(50)).tolist()
            lines.append(
                dict(
                    setting=setting, method=method, factor=factor, seed=seed, lr=factor, steps=1,
                    batch=1, metric="accuracy", split="test", validation=score, deployed=groups,
                )
            )  # fmt: skip
        return lines

    return run


def test_rates_go_on_until_the_best_lies_inside_and_seeds_until_the_interval_is_narrow(
    evidence, study
):
    lines = study(noise=0.01, most=200)
    for method in METHODS:
        swept = {s["factor"] for s in evidence.cell(lines, "count", method) if s["seed"] == 0}
        assert swept == {0.3, 1.0, 3.0, 10.0}  # 3 was the edge of the first three
        again = [s for s in evidence.cell(lines, "count", method) if s["seed"] > 0]
        assert {s["factor"] for s in again} == {3.0}
        assert len(again) == 2  # three seeds at least, and the interval is narrow already
    assert evidence.half_width(lines, "count") < evidence.NARROW


def test_an_open_question_takes_every_seed_and_the_table_says_what_is_known(evidence, study):
    lines = study(noise=1.0, most=200)
    assert max(s["seed"] for s in lines) == evidence.MOST_SEEDS - 1
    table = evidence.table(lines)
    assert "intervals at 97.5 %" in table  # two methods against norms
    row = next(line for line in table.splitlines() if line.startswith("| MDPD, felt"))
    assert row.endswith("| 20 |") and row.count("[") == 1
