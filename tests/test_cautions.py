"""What a user is told of doubtful data and doubtful results: one list of notes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mdpd_deploy.cli import app
from mdpd_deploy.data.cautions import count_shared, data_cautions
from mdpd_deploy.data.examples import Split, TaskData
from mdpd_deploy.tasks import Classify, Regress
from mdpd_deploy.train.cautions import result_cautions

NAMES = ("a", "b", "c")


def split(labels: list[int] | list[float], inputs: list | None = None, stem: str = "x") -> Split:
    return Split(inputs or [f"{stem} {i}" for i in range(len(labels))], np.array(labels))


def task(train: Split, validation: Split, *, names: tuple[str, ...] = NAMES, **more) -> TaskData:
    kind, metrics = (Classify(names), ("accuracy",)) if names else (Regress(), ("pearson",))
    evaluation = {"validation": validation, **more}
    return TaskData("t", kind, ("text",), metrics, train, evaluation)


def test_sound_data_have_no_cautions() -> None:
    assert data_cautions(task(split([0, 1, 2] * 2), split([0, 1, 2] * 40, stem="y"))) == []


def test_classes_of_one_example_and_classes_that_are_not_measured() -> None:
    data = task(split([0, 0, 1, 2]), split([0, 1] * 60, stem="y"))
    first, second = data_cautions(data)
    assert first == "train has one example only of: b, c."
    assert second.startswith("validation has no example of: c")


def test_a_tiny_validation_set_says_how_rough_it_is() -> None:
    (few,) = data_cautions(task(split([0, 1, 2] * 2), split([0, 1, 2] * 8, stem="y")))
    assert few == (
        "validation has 24 examples only, so its score is rough; chance alone moves accuracy by "
        "about ±20 points."
    )
    scores = [0.5, 1.5, 2.5]
    (few,) = data_cautions(task(split(scores), split(scores, stem="y"), names=()))
    assert few == "validation has 3 examples only, so its score is rough."


def test_equal_scores_leave_no_correlation() -> None:
    data = task(split([0.5, 1.5]), split([2.5] * 100, stem="y"), names=())
    assert data_cautions(data) == ["every label of validation is 2.5: no correlation is defined."]


def test_examples_in_two_splits_are_counted_by_split() -> None:
    train = split([0, 1, 2] * 2)
    held = split([0, 1, 2] * 40, [f"y {i}" for i in range(117)] + ["x 0", "x 1", "x 1"])
    test = split([0, 1, 2], ["z", "x 5", "X 5"])
    first, second = data_cautions(task(train, held, test=test))
    assert first.startswith("3 of 120 validation examples are in train too, word for word")
    assert second.startswith("1 of 3 test examples are in train too")


def picture(shade: int) -> Image.Image:
    return Image.new("L", (8, 8), shade)


def test_pictures_are_compared_by_their_bytes(tmp_path) -> None:
    for index in range(4):  # files of one size, so that bytes decide
        picture(index).save(tmp_path / f"{index}.bmp")
    shutil.copy(tmp_path / "0.bmp", tmp_path / "again.bmp")
    files = [tmp_path / f"{index}.bmp" for index in range(4)]
    held = [tmp_path / "again.bmp", files[3], tmp_path / "gone.bmp"]
    assert count_shared(split([0, 0, 0], files[:3]), split([0, 0, 0], held)) == 1
    in_memory = [[picture(1), picture(2)], [picture(2), picture(2), picture(3)]]
    train, other = (split([0] * len(found), found) for found in in_memory)
    assert count_shared(train, other) == 2


# --- results -----------------------------------------------------------------------------------


def told(accuracy: float, side: float | None, floor: float, said: list[int]) -> list[str]:
    data = task(split([0, 1, 2] * 2), split([0, 1, 2] * 2))
    metrics = {"deployed": {"accuracy": accuracy}}
    if side is not None:
        metrics["side"] = {"accuracy": side}
    outputs = {"output": np.eye(3, dtype=np.float32)[said]}
    return result_cautions(data, metrics, {"accuracy": floor}, outputs)


def test_a_sound_result_has_no_cautions() -> None:
    assert told(0.9, 0.9, 0.5, [0, 1, 2, 0, 1, 2]) == []
    assert told(0.9, None, 0.5, [0, 1, 2, 0, 1, 2]) == []


def test_what_is_deployed_is_worse_than_what_is_thrown_away() -> None:
    (note,) = told(0.636, 0.691, 0.5, [0, 1, 2, 0, 1, 2])
    assert "accuracy 0.6910 against 0.6360 on 6 examples" in note
    assert note.startswith("the side network, which is thrown away, is better")


def test_a_teacher_that_ends_behind_its_student() -> None:
    (note,) = told(0.7, 0.6, 0.5, [0, 1, 2, 0, 1, 2])
    assert note.startswith("the side network, which teaches, ends behind")
    assert "accuracy 0.6000 against 0.7000" in note and "--method norms" in note


def test_a_model_that_learned_nothing_and_a_class_it_never_answers() -> None:
    first, second = told(1 / 3, None, 1 / 3, [1] * 6)
    assert "no better on validation than always answering the most frequent class" in first
    assert second == "the deployed model never answers, on validation: a, c."


def test_an_undefined_score_is_worse_than_a_side_network_that_has_one() -> None:
    data = task(split([0.5, 1.5]), split([0.5, 1.5]), names=())
    metrics = {"deployed": {"pearson": None}, "side": {"pearson": 0.2}}
    outputs = {"output": np.zeros((2, 1), np.float32)}
    (note,) = result_cautions(data, metrics, None, outputs)
    assert "pearson 0.2000 against undefined" in note
    metrics = {"deployed": {"pearson": None}, "side": {"pearson": None}}
    assert result_cautions(data, metrics, None, outputs) == []


# --- at every place where notes are ------------------------------------------------------------


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory) -> Path:
    """Texts of which nothing can be learned, one of them in both splits."""
    folder = tmp_path_factory.mktemp("doubtful")
    words = ["good", "bad", "slow", "warm"]
    rows = [f"the film was {word},{label}" for word in words for label in ("pos", "pos", "neg")]
    (folder / "train.csv").write_text("\n".join(["sentence,label", *rows, "dull,odd"]))
    held = ["the film was good,pos", "very bad,neg", "very good,odd"]
    (folder / "validation.csv").write_text("\n".join(["sentence,label", *held]))
    return folder


def test_notes_are_on_the_terminal_in_the_summary_and_in_the_report(
    doubtful, text_options, tmp_path
) -> None:
    words = [
        "train", "--task", "classify", "--data", str(doubtful), "--text", "sentence",
        "--backbone", str(text_options["backbone"]), "--method", "probe", "--out",
        str(tmp_path / "run"), "--set", "data.max_length=24", "--steps", "1",
    ]  # fmt: skip
    planned = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert planned.exit_code == 0, planned.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    notes = json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]
    plan = json.loads(planned.stdout)["notes"]
    lengths = json.loads(planned.stdout)["tokens"]["train"]
    assert (lengths["longest"], json.loads(planned.stdout)["text_length"]) == (6, 6)
    assert notes[: len(plan)] == plan
    heads = ["train: of 13 texts", "train has one", "validation has 3", "1 of 3 validation"]
    assert [note.startswith(head) for note, head in zip(plan, heads, strict=True)] == [True] * 4
    assert any("never answers" in note for note in notes[len(plan) :])
    report = (tmp_path / "run" / "report.html").read_text()
    for note in notes:
        assert done.stderr.count(note) == 1
        assert note in report
