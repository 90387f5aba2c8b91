"""The report page: what it says, that it is self-contained, escaped and the same every time."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mdpd_deploy.report import charts
from mdpd_deploy.report.page import duration, join, picture, size, tag
from mdpd_deploy.report.predictions import Predictions, Sample, pick_samples
from mdpd_deploy.tasks import Classify, Regress
from mdpd_deploy.tasks.classify.page import confusion_matrix
from mdpd_deploy.train.report import write_report

EVIL = '<script>alert("1")</script>'


def summary_of(method="mdpd", **changes):
    with_side = method == "mdpd"
    summary = {
        "schema": 1,
        "task": "digits",
        "method": method,
        "side": "unipt" if with_side else None,
        "backbone": {"name": "builtin:tiny", "revision": None, "sha256": "ab" * 32},
        "primary_metric": "accuracy",
        "metrics": {"deployed": {"accuracy": 0.75}}
        | ({"side": {"accuracy": 0.5}} if with_side else {}),
        "params": {"backbone": 200_000, "trained": 3_000, "deployed_delta": 1_234, "side": 1_766},
        "memory": {
            "peak_live_bytes": 61_000_000,
            "forecast_bytes": 60_500_000,
            "peak_rss_bytes": None,
            "peak_cuda_bytes": None,
            "parts": {"weights": 40_000_000, "activations": 21_000_000},
        },
        "time": {"train_s": 75.0, "samples_per_s": 1234.5},
        "versions": {"torch": "2.15.0"},
        "device": "cpu",
        "seed": 7,
        "status": "completed",
    }
    return summary | changes


def lines_of(side=True):
    lines = []
    for step in range(1, 9):
        line = {"step": step, "epoch": 0, "split": "train", "loss": 2.0 / step, "lr": 1e-3}
        lines.append(line | ({"loss_deep": 100.0 / step, "grad_norm_side": 1.0} if side else {}))
    validation = {"step": 8, "epoch": 0, "split": "validation", "deployed": {"accuracy": 0.75}}
    return [*lines, validation | ({"side": {"accuracy": 0.5}} if side else {})]


def classified(names=("cat", "dog"), side=True, samples=()):
    """Four examples: deployed gets three right, the side network two; they agree on one pair."""
    labels = np.array([0, 0, 1, 1])
    deployed = np.array([[2.0, 0], [2, 0], [0, 2], [4, 0]])
    guesses = np.array([[2.0, 0], [0, 2], [2, 0], [0, 2]])
    return Predictions(Classify(names), labels, deployed, guesses if side else None, samples)


def write(folder, **changes):
    given = {"summary": summary_of(), "metrics": lines_of(), "predictions": classified()} | changes
    write_report(folder / "report.html", **given)
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects elements, attributes and text; fails when elements are not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_headline_figures(tmp_path):
    text = Reader(write(tmp_path)).text
    for said in (
        "digits · mdpd over unipt",
        "Deployed model, validation 75.0 % accuracy",
        "Side network, validation 50.0 % accuracy",
        "Trained parameters 3,000 1.50 % of the backbone's; 1,234 stay in the deployed model",
        "Peak memory 61.00 MB 60.50 MB forecast",
        "Training time 1 min 15 s 1,234.5 examples per second",
        "seed 7",
    ):
        assert said in text


def test_agreement_counts_by_hand(tmp_path):
    text = Reader(write(tmp_path)).text
    assert "Same prediction for 25.0 % of 4 evaluation examples." in text
    assert "deployed right 1 25.0 % 2 50.0 %" in text
    assert "deployed wrong 1 25.0 % 0 0.0 %" in text


def test_confusion_matrix_by_hand(tmp_path):
    assert confusion_matrix(classified(), 2).tolist() == [[2, 0], [1, 1]]
    text = Reader(write(tmp_path)).text
    assert "cat 2 · 100.0 % dog 1 1 50.0 %" in text


def test_every_logged_curve_is_drawn(tmp_path):
    reader = Reader(write(tmp_path))
    for title in ("Validation accuracy", "Total loss", "Deep feature distillation",
                  "Learning rate", "Gradient norm"):  # fmt: skip
        assert title in reader.texts
    assert "Logits distillation" not in reader.texts  # no such line
    assert reader.tags.count("svg") == 5


@pytest.mark.parametrize("method", ["probe", "norms"])
def test_runs_without_a_side_network(tmp_path, method):
    page = write(
        tmp_path,
        summary=summary_of(method),
        metrics=lines_of(side=False),
        predictions=classified(side=False),
    )
    text = Reader(page).text
    assert f"digits · {method}" in text
    assert "Side network" not in text
    assert "Agreement" not in text
    assert "Confusion matrix" in text


def test_regression_has_scatters(tmp_path):
    labels = np.array([0.0, 1.0, 2.0])
    predictions = Predictions(
        Regress(), labels, labels[:, None] + 0.5, labels[:, None] * 2.0, (Sample(1, "a text"),)
    )
    metrics = {"pearson_spearman": 1.0, "rmse": 0.5}
    summary = summary_of(primary_metric="pearson_spearman", metrics={"deployed": metrics})
    text = Reader(write(tmp_path, predictions=predictions, summary=summary)).text
    assert "Deployed model, validation 1 mean of Pearson and Spearman · RMSE 0.5" in text
    assert "Predictions against labels" in text
    # gaps of 0.5, 0.5 and 1.5
    assert "Correlation 1.000; mean difference 0.8333, largest 1.5." in text
    assert "a text predicted 1.5 label 1" in text


def test_many_classes_show_the_worst_confusions(tmp_path):
    names = tuple(f"class {n}" for n in range(40))
    labels = np.repeat(np.arange(40), 3)
    outputs = np.eye(40)[labels]
    outputs[0] = outputs[1] = np.eye(40)[7]  # two of class 0 go to class 7
    outputs[30] = np.eye(40)[3]  # one of class 10 goes to class 3
    predictions = Predictions(Classify(names), labels, outputs, outputs)
    text = Reader(write(tmp_path, predictions=predictions)).text
    assert "Confusion matrix" not in text
    assert "class 0 class 7 2 66.7 % class 10 class 3 1 33.3 %" in text
    assert "recall examples class 0 33.3 % 3 class 10 66.7 % 3" in text


def test_equal_input_gives_an_equal_page(tmp_path):
    (tmp_path / "again").mkdir()
    assert write(tmp_path) == write(tmp_path / "again")


def test_nothing_comes_from_outside(tmp_path):
    samples = (Sample(0, Image.new("RGB", (300, 200), "red")),)
    page = write(tmp_path, predictions=classified(samples=samples))
    assert "://" not in page
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("src", "href"):
            assert value.startswith(("#", "data:image/png;base64,"))
        assert not name.startswith("on")
        assert name != "style" or not re.search(r"url\((?!#)", value)


def test_texts_of_users_are_escaped(tmp_path):
    (tmp_path / "config.yaml").write_text(f"task: '{EVIL}'\n")
    samples = (Sample(0, EVIL), Sample(3, (EVIL, "b & c")))
    page = write(
        tmp_path,
        summary=summary_of(task=EVIL, backbone={"name": EVIL, "sha256": EVIL}),
        predictions=classified(names=(EVIL, "dog"), samples=samples),
    )
    reader = Reader(page)
    assert "script" not in reader.tags
    assert reader.text.count(EVIL) >= 7  # shown as it was typed
    assert "b & c" in reader.text


def test_config_and_command_to_run_again(tmp_path):
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.003\n")
    text = Reader(write(tmp_path)).text
    assert "mdpd train config.yaml" in text
    assert "lr: 0.003" in text
    assert "torch 2.15.0" in text


def test_pictures_and_picture_files_become_part_of_the_page(tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (500, 300), "red").save(file)
    page = write(tmp_path, predictions=classified(samples=(Sample(0, file),)))
    assert str(file) not in page
    assert Reader(page).tags.count("img") == 1
    assert 'class="tiny"' in picture(Image.new("L", (8, 8)))


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    lines = lines_of()
    lines[2]["loss"] = math.nan
    lines[3]["loss"] = None
    lines[4]["loss"] = -1.0  # no logarithm
    summary = summary_of(metrics={"deployed": {"accuracy": math.nan}})
    text = Reader(write(tmp_path, metrics=lines, summary=summary)).text
    assert "undefined accuracy" in text


def test_a_run_that_logged_nothing_still_has_a_page(tmp_path):
    text = Reader(write(tmp_path, metrics=[], summary=summary_of(memory={}, time={}))).text
    assert "Training time" not in text and "Peak memory" not in text


def test_notes_of_the_run_are_shown(tmp_path):
    notes = ["10 % of the training data were kept for <validation>."]
    assert notes[0] in Reader(write(tmp_path, summary=summary_of(notes=notes))).text


def test_a_learning_rate_for_each_group(tmp_path):
    lines = [{"step": n, "split": "train", "lr": {"side": 1e-3, "norms": 1e-4}} for n in (1, 2)]
    reader = Reader(write(tmp_path, metrics=lines))
    assert "norms" in reader.texts and reader.tags.count("svg") == 1


def test_samples_are_the_surest_mistakes_then_a_spread():
    labels = np.zeros(100, dtype=np.int64)
    outputs = np.tile([3.0, 0.0], (100, 1))
    outputs[40], outputs[60], outputs[80] = [0, 1], [0, 9], [0, 5]
    chosen = pick_samples(Classify.numbered(2), [str(n) for n in range(100)], labels, outputs)
    assert [s.index for s in chosen[:3]] == [60, 80, 40]
    assert len(chosen) == len({s.index for s in chosen}) == 12
    assert chosen[3].index == 0 and chosen[-1].index == 99
    assert all(s.raw == str(s.index) for s in chosen)
    few = pick_samples(Classify.numbered(2), ["a"], labels[:1], outputs[:1])
    assert [s.index for s in few] == [0]


def test_samples_of_regression_are_the_largest_errors():
    labels = np.arange(30, dtype=float)
    outputs = labels[:, None].copy()
    outputs[5] += 3
    outputs[9] -= 4
    chosen = pick_samples(Regress(), ["x"] * 30, labels, outputs, most=4)
    assert [s.index for s in chosen] == [9, 5, 0, 29]


def test_long_lines_are_averaged():
    x = list(range(3000))
    xs, ys = charts._thin(x, [2.0 * value for value in x])
    assert len(xs) == charts.MAX_POINTS
    assert ys == [2 * value for value in xs]
    assert xs[0] == 4.5  # mean of 0 … 9


def test_charts_take_their_colours_from_the_page():
    svg = charts.line_chart([charts.Series("a", [1, 2], [1.0, 2.0], colour=2)])
    assert "var(--series-2)" in svg and "var(--muted)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href|id|clip-path)="[^"]*"', "", svg))


def test_logarithmic_scale_only_where_it_helps():
    def labels(*values):
        svg = charts.line_chart([charts.Series("", [1, 2], list(values))], log=True)
        return re.findall(r"text-anchor: end[^>]*>([^<]+)</text>", svg)

    assert {"1", "10", "100"} <= set(labels(1.0, 200.0))
    assert len(labels(100.0, 120.0)) >= 4 and "110" in labels(100.0, 120.0)
    assert len(labels(-1.0, 20.0)) >= 3


def test_markup():
    assert tag("p", "a<b", tag("i", "c"), None, class_="x&y", hidden=True, title=None) == (
        '<p class="x&amp;y" hidden>a&lt;b<i>c</i></p>'
    )
    assert join(["<", [tag("b", 1)]]) == "&lt;<b>1</b>"


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.26, "4.3 s"), (59.97, "1 min 0 s"), (3725, "1 h 2 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_sizes():
    assert [size(n) for n in (12, 1_500, 2_340_000, 1.1e9)] == [
        "12 bytes", "1.50 kB", "2.34 MB", "1.10 GB",
    ]  # fmt: skip


def test_pictures_are_small():
    found = re.search(r"base64,([^\"]+)", picture(Image.new("RGB", (4000, 3000))))
    assert found is not None
    data = base64.b64decode(found.group(1))
    assert Image.open(io.BytesIO(data)).size == (128, 96)
