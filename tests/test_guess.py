"""The task that data are plainly for, and the commands that messages suggest."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.cli import main
from mdpd_deploy.commands.train import build_config, plan
from mdpd_deploy.config import Config, DataConfig
from mdpd_deploy.errors import UserError


def pictures(root: Path) -> Path:
    for name in ("cat", "dog"):
        for index in range(3):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(root / name / f"{index}.png")
    return root


def table(path: Path, labels: list[Any], columns: str = "text,label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{columns}\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(labels)))
    return path


def task(config: Any = None, **flags: Any) -> str:
    return build_config(config, [], flags).task


def test_class_folders_and_tables_of_classes_are_classified(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my pics")
    assert task(data=str(folder)) == task(folder) == task(str(folder)) == "classify"
    assert task(data=table(tmp_path / "a.csv", ["x", "y"])) == "classify"
    assert task(tmp_path / "a.csv") == "classify"
    assert task(table(tmp_path / "b.csv", [1, 2, 5, 1])) == "classify"
    assert task(data=table(tmp_path / "c.csv", ["x"], "text,mood"), label="mood") == "classify"
    table(tmp_path / "splits" / "train.csv", ["x", "y"])
    assert task(tmp_path / "splits") == "classify"


def test_a_task_that_is_named_stays(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ["x", "y"])
    assert task(data=path, task="regress") == "regress"
    assert task(Config(task="regress"), data=path) == "regress"
    assert task(Config(data=DataConfig(path=str(path)))) == "classify"
    assert build_config(None, ["task=regress"], {"data": path}).task == "regress"
    assert task() == "digits"
    given = build_config(None, [], {"data": path}).to_yaml()
    (tmp_path / "c.yaml").write_text(given)
    assert task(tmp_path / "c.yaml") == "classify"


@pytest.mark.parametrize(
    ("labels", "columns", "words"),
    [
        ([0.5, 1.5], "text,label", "the column 'label' holds numbers"),
        (range(150), "text,label", "the column 'label' holds numbers"),
        (["x", "y"], "text,mood", "its columns are text, mood"),
    ],
)
def test_what_may_be_meant_otherwise_gets_the_command(tmp_path, labels, columns, words) -> None:
    path = table(tmp_path / "my data.csv", list(labels), columns)
    with pytest.raises(UserError) as caught:
        task(data=path)
    said = str(caught.value)
    assert words in said
    command = shlex.split(said.split("`")[1])
    assert command[:6] == ["mdpd", "train", "--task", "classify", "--data", str(path)]


def test_suites_runs_and_data_sets_get_the_command(tmp_path: Path) -> None:
    table(tmp_path / "glue" / "CoLA" / "train.tsv", [])
    with pytest.raises(UserError, match=r"`mdpd train --task glue/cola --data .*glue`"):
        task(tmp_path / "glue")
    table(tmp_path / "vtab" / "dtd" / "train800.txt", [])
    for folder in (tmp_path / "vtab", tmp_path / "vtab" / "dtd"):
        with pytest.raises(UserError, match=r"`mdpd train --task vtab/dtd --data "):
            task(folder)
    with pytest.raises(UserError, match="--task classify --data hub:imdb --text COLUMN"):
        task("hub:imdb")
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.yaml").write_text("task: digits\n")
    with pytest.raises(UserError, match=r"is a run, no data: `mdpd train --resume '.*/a run'`"):
        task(tmp_path / "a run")


def test_data_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both name data: give one"):
        task(pictures(tmp_path / "pics"), data="other")


def test_the_command_line_takes_a_folder(tmp_path: Path, tiny_vit: Path, capsys) -> None:
    folder = pictures(tmp_path / "my pics")
    words = ["train", str(folder), "--backbone", str(tiny_vit), "--method", "probe", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "task: classify, by what" in capsys.readouterr().err
    assert Run.open(tmp_path / "run").config.task == "classify"
    planned = plan(folder, backbone=tiny_vit, method="probe")
    assert planned.classes == ("cat", "dog")
    assert main(["train", str(tmp_path / "gone")]) == 2


def test_suggested_commands_quote_paths(tmp_path: Path) -> None:
    folder = tmp_path / "a run; rm"
    folder.mkdir()
    (folder / "config.yaml").write_text(Config().to_yaml())
    with pytest.raises(UserError) as caught:
        Run.open(folder)
    assert shlex.split(str(caught.value).split("`")[1])[-1] == str(folder)


def test_a_comparison_guesses_only_without_a_task(tmp_path: Path) -> None:
    from mdpd_deploy.commands.study_plan import shared_config

    folder = pictures(tmp_path / "pics")
    assert shared_config(None, [], {"data": str(folder)}, guess=True)[1] == ["classify"]
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    table(tmp_path / "glue" / "CoLA" / "train.tsv", [])
    assert shared_config(None, [], {"data": str(tmp_path / "glue")})[1] == ["digits"]
