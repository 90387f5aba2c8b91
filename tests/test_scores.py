"""Every score is shown with its split and size, and the test split, which chose nothing, first."""

import json
import re
import shutil

import pytest

from mdpd_deploy import fit
from mdpd_deploy.artifacts.scores import in_order, scores_of
from mdpd_deploy.cli import main


@pytest.fixture(scope="module")
def splits(tmp_path_factory, sentence_folder):
    """`sentence_folder` with a labelled test.csv of 20 rows."""
    folder = tmp_path_factory.mktemp("with-test") / "data"
    shutil.copytree(sentence_folder, folder)
    rows = (folder / "validation.csv").read_text().splitlines(keepends=True)
    (folder / "test.csv").write_text("".join(rows[:21]))
    return folder


@pytest.fixture(scope="module")
def words(splits, tiny_bert):
    """The words of `mdpd train` for a short run with a test split."""
    return [
        *("--task", "classify", "--data", str(splits), "--text", "sentence"),
        *("--backbone", str(tiny_bert), "--steps", "4", "--batch", "8"),
        *("--set", "side.reduction=2", "--set", "data.max_length=24"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, words, splits, tiny_bert):
    out = tmp_path_factory.mktemp("scores") / "run"
    return fit(
        task="classify", data=splits, text="sentence", backbone=tiny_bert, steps=4, batch=8,
        out=out, quiet=True,
        set=["side.reduction=2", "data.max_length=24", "train.eval_every=2"],
    )  # fmt: skip


def text_of(page):
    plain = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", plain))


def test_splits_come_in_the_order_in_which_they_count():
    assert in_order(["validation_mismatched", "validation", "test"]) == [
        "test", "validation", "validation_mismatched",
    ]  # fmt: skip


def test_the_summary_holds_every_split_with_its_size_and_floor(run):
    test, validation = scores_of(run.summary)
    assert (test.words, validation.words) == ("test, 20 examples", "validation, 30 examples")
    assert set(test.models) == {"deployed", "side"}
    assert validation.chose and not test.chose  # two evaluations, the better one kept
    assert set(test.majority) == set(validation.majority) == {"accuracy", "f1_macro"}


@pytest.mark.parametrize(
    ("more", "chosen"),
    [([], None), (["train.eval_every=2"], "validation"),
     (["train.eval_every=2", "train.keep=last"], None)],
)  # fmt: skip
def test_what_chose_the_weights_is_said_only_where_something_did(
    more, chosen, image_options, tmp_path
):
    found = fit(out=tmp_path / "run", quiet=True, **{**image_options, "steps": 4}, set=more)
    assert found.summary["weights_chosen_on"] == chosen


def test_train_ends_with_the_test_score_first(words, tmp_path, capsys):
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    test = summary["metrics_test"]["deployed"]["accuracy"]
    assert f"{test:.4f}" in shown
    assert shown.index("test, 20 examples") < shown.index("validation, 30 examples")


def test_the_report_puts_the_test_score_into_the_headline(run):
    text = text_of((run.path / "report.html").read_text(encoding="utf-8"))
    test = run.summary["metrics_test"]["deployed"]["accuracy"]
    assert f"Deployed model, test, 20 examples {100 * test:.1f} %" in text
    assert "Without learning, test, 20 examples" in text
    assert "validation, 30 examples, which chose the weights" in text
    assert "Confusion matrix · validation, 30 examples" in text


def test_eval_measures_test_first(run, capsys):
    assert main(["eval", str(run.path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == ["test", "validation"]
