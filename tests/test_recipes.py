"""Recipes: what they set, where they stand among file, --set and flags, and what is refused."""

import json
import shutil

import pytest
import yaml

from mdpd_deploy import fit
from mdpd_deploy.cli import main
from mdpd_deploy.commands.compare import compare
from mdpd_deploy.commands.run_config import build_config
from mdpd_deploy.commands.study_plan import asked_plan, shared_config, stored_plan
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import Config, check_config
from mdpd_deploy.config.recipes import (
    Recipe,
    flat,
    is_whole,
    nested,
    read_recipe,
    recipe_names,
    recipe_settings,
    with_recipe,
)
from mdpd_deploy.data.few_shot import CLASSES as FEW_SHOT
from mdpd_deploy.data.few_shot import SHOTS
from mdpd_deploy.data.vtab import OFFICIAL_CLASSES
from mdpd_deploy.errors import UserError


def built(recipe, *sets, config=None, **words):
    return build_config(config, list(sets), {"recipe": recipe, **words})


def everything(recipe: Recipe) -> dict:
    options = flat(recipe.options)
    for row in recipe.rows:
        options |= {name: value for name, value in row.items() if name not in ("task", "backbone")}
    return options


# --- what they hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_option_of_a_recipe_exists_and_has_a_value_it_can_have(name):
    recipe = read_recipe(name)
    assert recipe.differs and recipe.backbones and recipe.tasks
    known = set(Config().flat()) | {
        f"{part}.{option}"
        for part, field in Config.model_fields.items()
        for option in getattr(field.annotation, "model_fields", ())
    }
    assert everything(recipe).keys() <= known
    for row in [{}, *recipe.rows]:
        task, backbone = row.get("task", "any"), row.get("backbone", "any")
        options = recipe.options_for(task, backbone)
        plain = {k: v for k, v in options.items() if not str(v).startswith("${")}
        assert check_config(nested(plain))
        assert (
            options.items()
            >= {
                k: v for k, v in row.items() if k in known and k not in ("task", "backbone")
            }.items()
        )


def test_every_task_of_vtab_has_its_rate_on_both_backbones():
    recipe = read_recipe("vtab-dtl")
    for name in OFFICIAL_CLASSES:
        for backbone in (
            "timm:vit_base_patch16_224.orig_in21k",
            "timm:swin_base_patch4_window7_224",
        ):
            for family in ("vtab", "vtab-full"):
                options = recipe.options_for(f"{family}/{name}", backbone)
                assert {"optim.lr", "side.kernel", "side.rank"} <= options.keys()
                assert options["side.rank"] == (2 if "vit" in backbone else 4)
    assert recipe.options_for("vtab/kitti", "timm:vit_base")["optim.lr"] == 8e-3
    assert recipe.options_for("vtab/dsprites_loc", "timm:swin_base")["optim.lr"] == 1e-2
    dropped = [
        row for row in recipe.rows if row["backbone"] == "vit*" and row.get("backbone.drop_path")
    ]
    assert len(dropped) == 15


def test_rates_of_few_shots_are_the_papers():
    recipe = read_recipe("few-shot-dtl")
    rates = {
        (name, shots): recipe.options_for(f"few-shot/{name}:{shots}", "vit")["optim.lr"]
        for name in FEW_SHOT
        for shots in SHOTS
    }
    assert [rates["fgvc-aircraft", shots] for shots in SHOTS] == [1e-3, 1e-3, 3e-3, 5e-3, 3e-3]
    assert [rates["oxford-flowers102", shots] for shots in SHOTS] == [3e-3, 5e-3, 8e-3, 3e-3, 3e-3]
    assert [rates["standford-cars", shots] for shots in SHOTS] == [1e-3, 1e-3, 3e-3, 3e-3, 5e-3]
    assert {rates[name, shots] for name in ("food101", "oxford-pets") for shots in SHOTS} == {1e-3}


# --- where they stand -----------------------------------------------------------------------------


def test_a_recipe_stands_above_defaults_and_below_all_that_is_given(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("train: {batch: 8, keep: best}\noptim: {weight_decay: 0.2}\n")
    config = built(
        "vtab-dtl", "train.keep=last", "optim.lr=1", config=file, task="vtab/svhn", lr=0.25
    )
    assert config.recipe == "vtab-dtl"
    assert (config.method, config.side.name, config.train.epochs) == ("side", "dtlv1", 110)
    assert (config.train.batch, config.optim.weight_decay) == (8, 0.2)  # the file
    assert config.train.keep == "last"  # --set over the file
    assert config.optim.lr == 0.25  # the flag over --set and the row's 0.005
    assert config.side.kernel == 5  # the row


def test_a_file_may_name_the_recipe_and_that_of_a_run_is_left_as_it_is(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("recipe: vtab-dtl\ntask: vtab/svhn\ntrain: {epochs: 3}\n")
    config = build_config(file, [], {})
    assert (config.train.epochs, config.optim.lr) == (3, 0.005)
    whole = tmp_path / "config.yaml"
    whole.write_text(config.to_yaml())
    assert is_whole(build_config(whole, [], {}))
    other = build_config(whole, [], {"task": "vtab/kitti"})
    assert (other.recipe, other.optim.lr) == ("vtab-dtl", 0.005)
    with pytest.raises(UserError, match=r"holds every option, so that --recipe has nothing"):
        built("vtab-mdpd", config=whole)


def test_one_rate_for_all_follows_the_one_that_is_given():
    optim = built("mdpd-paper", task="digits").optim
    assert optim.lr == optim.norm_lr == optim.head_lr == 0.001
    optim = built("mdpd-paper", "optim.head_lr=0.5", task="digits", lr=0.03).optim
    assert (optim.lr, optim.norm_lr, optim.head_lr) == (0.03, 0.03, 0.5)


def test_of_two_recipes_the_later_one_counts():
    both = built("mdpd-paper, glue-encoder", task="glue/rte")
    assert (both.optim.lr, both.optim.norm_lr, both.train.epochs) == (0.003, 0.003, 20)
    assert (both.train.student_task_weight, both.distill.side_head) == (0, "paper")
    assert built("glue-encoder,mdpd-paper", task="glue/rte").optim.lr == 0.001


def test_rows_are_of_the_backbone_that_is_given():
    assert built("vtab-dtl", task="vtab/dtd").backbone.name.startswith("timm:vit_base_patch16")
    swin = built("vtab-dtl", task="vtab/dtd", backbone="timm:swin_base_patch4_window7_224")
    assert (swin.side.rank, swin.side.kernel, swin.optim.lr) == (4, 5, 0.0008)
    folder = built("vtab-dtl", task="vtab/dtd", backbone="/models/owner/vit_base_patch16_224")
    assert folder.optim.lr == 0.0003


def test_warm_up_and_tail_shrink_with_the_run():
    optim = built("vtab-dtl", task="vtab/svhn").optim
    assert (optim.warmup_epochs, optim.cooldown_epochs, optim.per_epoch) == (10, 10, True)
    optim = built("vtab-dtl", task="vtab/svhn", epochs=11).optim
    assert (optim.warmup_epochs, optim.cooldown_epochs, optim.per_epoch) == (1, 1, None)
    optim = built("vtab-dtl", "optim.warmup_epochs=2", task="vtab/svhn", epochs=11).optim
    assert (optim.warmup_epochs, optim.cooldown_epochs) == (2, 1)


def test_settings_say_what_was_given_in_a_recipes_place():
    config = built("vtab-dtl", task="vtab/svhn", epochs=2)
    settings = {setting.option: setting[1:] for setting in recipe_settings(config)}
    assert settings["train.epochs"] == (2, 110)
    assert settings["optim.lr"] == (0.005, 0.005)
    assert with_recipe(config) == config


# --- what is refused ------------------------------------------------------------------------------

WRONG = [
    (["--recipe", "vtab-dlt"], "--recipe: unknown 'vtab-dlt'. Did you mean 'vtab-dtl'?"),
    (["--recipe", ""], "--recipe: unknown ''."),
    (
        ["--recipe", "vtab-dtl", "--task", "glue/rte"],
        "the recipe vtab-dtl is for the tasks vtab-full/*, vtab/*, and --task is glue/rte",
    ),
    (["--recipe", "vtab-dtl"], "is for the tasks vtab-full/*, vtab/*, and no --task is given"),
    (["--recipe", "glue-encoder", "--task", "glue/wnli"], "and --task is glue/wnli"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_a_recipe_that_does_not_fit_is_one_sentence(words, said, capsys):
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_whose_task_is_not_named_is_not_guessed(digit_folder):
    with pytest.raises(UserError, match="is for the tasks few-shot"):
        built("few-shot-dtl", data=digit_folder)
    assert built("mdpd-paper", data=digit_folder).task == "classify"


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A data set in VTAB-1K's layout: 8 + 4 pictures of two classes, 4 for test."""
    from PIL import Image

    root = tmp_path_factory.mktemp("vtab")
    folder = root / "toys"
    folder.mkdir()
    lists = {"train800": range(8), "val200": range(8, 12), "test": range(12, 16)}
    for number in range(16):
        Image.new("RGB", (16, 16), (250 * (number % 2), number, 0)).save(folder / f"{number}.png")
    lists["train800val200"] = range(12)
    for name, numbers in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{n}.png {n % 2}\n" for n in numbers))
    return root


def test_a_run_by_a_recipe_holds_all_it_took_and_says_what_is_not_the_papers(
    toys, tiny_vit, tmp_path
):
    words = dict(recipe="vtab-mdpd", task="vtab/toys", data=toys, backbone=tiny_vit, epochs=1)
    run = fit(out=tmp_path / "run", quiet=True, **words)
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    assert stored["recipe"] == "vtab-mdpd" and stored["train"]["epochs"] == 1
    assert stored["train"]["keep"] == "last" and stored["optim"]["weight_decay"] == 0.05
    assert any("the recipe vtab-mdpd is for vit_base" in note for note in run.summary["notes"])
    again = build_config(run.path / "config.yaml", [], {})
    assert again == run.config


def test_the_plan_shows_every_option_of_the_recipe(toys, tiny_vit, capsys):
    words = ["--recipe", "vtab-dtl", "--task", "vtab/toys", "--data", str(toys)]
    words += [
        "--backbone",
        str(tiny_vit),
        "--epochs",
        "1",
        "--set",
        "side.dtl_first=2",
        "--dry-run",
    ]
    assert main(["train", *words]) == 0
    shown = capsys.readouterr().out
    assert "train.epochs=1.0 (the recipe has 110)" in shown and "optim.weight_decay=0.05" in shown
    assert main(["train", *words, "--json"]) == 0
    found = {row["option"]: row for row in json.loads(capsys.readouterr().out)["recipe"]}
    assert found["train.epochs"] == {"option": "train.epochs", "value": 1.0, "recipe": 110}


def test_a_method_is_spared_what_only_the_recipes_method_reads(toys, tiny_vit):
    words = dict(recipe="vtab-dtl", task="vtab/toys", data=toys, backbone=tiny_vit)
    found = {row.option: row.value for row in plan(method="norms", **words).recipe}
    assert found["method"] == "norms" and found["optim.weight_decay"] == 0.05
    with pytest.raises(UserError, match=r"side\.rank=3 does nothing with --method norms"):
        plan(method="norms", set=["side.rank=3"], **words)


# --- comparisons ----------------------------------------------------------------------------------


def asked(folder, recipe, *, methods=None, seeds=None, factors=None, tasks=None, **words):
    base, own = shared_config(None, [], {"recipe": recipe, **words}, guess=not tasks)
    plan = asked_plan(folder, base, methods, tasks or own, seeds, factors, print, unread=True)
    return plan


def test_a_comparison_takes_methods_tasks_seeds_and_rates_from_its_recipe(tmp_path):
    found = asked(tmp_path, "glue-encoder")
    assert len(found.tasks) == 8 and "glue/wnli" not in found.tasks
    assert found.asks[0].seeds == (0, 1, 2) and found.asks[0].factors == (1.0,)
    assert "side:lst" in found.methods
    trials = {cell.task: found.sweep(cell)[0].config for cell in found.cells()}
    assert (trials["glue/rte"].train.epochs, trials["glue/sst2"].train.epochs) == (20, 10)
    assert {trial.optim.lr for trial in trials.values()} == {0.003}
    for trial in trials.values():  # what the child is given is left as it is
        read = check_config(yaml.safe_load(trial.to_yaml()))
        assert is_whole(read) and with_recipe(read).recipe == "glue-encoder"
    told = asked(tmp_path, "glue-encoder", methods=["probe"], seeds=1, factors=[0.3, 1], epochs=2)
    assert told.methods == ("probe",) and told.asks[0].factors == (0.3, 1.0)
    assert {told.sweep(cell)[0].config.train.epochs for cell in told.cells()} == {2}


def test_rates_of_tasks_are_swept_and_a_methods_own_one_counts(tmp_path):
    words = dict(tasks=["vtab/svhn", "vtab/dtd"], methods=["side:dtlv1", "probe+optim.lr=0.5"])
    found = asked(tmp_path, "vtab-dtl", factors=[2], **words)
    rates = {(c.task, c.method): found.sweep(c)[0].config.optim.lr for c in found.cells()}
    assert rates["vtab/svhn", "side:dtlv1"] == 0.01 and rates["vtab/dtd", "side:dtlv1"] == 0.0006
    assert rates["vtab/svhn", "probe+optim.lr=0.5"] == 1.0


def test_every_seed_of_few_shots_has_its_own_list(tmp_path):
    found = asked(tmp_path, "few-shot-dtl", tasks=["few-shot/oxford-pets:4"])
    assert found.base.data.split_seed is None and found.asks[0].seeds == (0, 1, 2)
    other = asked(tmp_path, "glue-encoder", tasks=["glue/rte"])
    assert other.base.data.split_seed == 0


def test_a_task_that_the_recipe_is_not_for_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vtab-dtl is for the tasks .* --task is glue/rte"):
        asked(tmp_path, "vtab-dtl", tasks=["glue/rte"])


def test_a_comparison_goes_on_with_the_options_of_each_task(toys, tiny_vit, tmp_path, monkeypatch):
    shutil.copytree(tiny_vit, tmp_path / "vit_tiny")
    for name in ("svhn", "dtd"):
        shutil.copytree(toys / "toys", tmp_path / "data" / name)
    words = dict(recipe="vtab-dtl", backbone=tmp_path / "vit_tiny", data=tmp_path / "data")
    monkeypatch.setattr("mdpd_deploy.study.schedule.run_trials", lambda plan, *_, **__: [])
    monkeypatch.setattr("mdpd_deploy.commands.compare._timed", lambda *_: ({}, ""))
    for task in ("vtab/svhn", "vtab/dtd"):
        compare(task=[task], methods=["probe"], epochs=1, out=tmp_path / "study", **words)
    found = stored_plan(tmp_path / "study")
    rates = {cell.task: found.sweep(cell)[0].config.optim.lr for cell in found.cells()}
    assert rates == {"vtab/svhn": 0.005, "vtab/dtd": 0.0003}
    assert {found.sweep(cell)[0].config.train.epochs for cell in found.cells()} == {1}


def test_recipes_are_listed_and_shown_whole(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert "vtab-dtl" in shown and "fgvc" in shown
    assert main(["recipes", "vtab-dtl"]) == 0
    shown = capsys.readouterr().out
    assert "differs:" in shown and "smallnorb_ele" in shown
    assert yaml.safe_load(shown)["options"]["side"]["rank"] == 2
    assert main(["recipes", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(recipe_names())
    assert main(["recipes", "nothing"]) == 2


def test_a_comparison_can_be_looked_at_without_data(capsys):
    assert main(["compare", "--recipe", "glue-encoder", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "120" in shown and "train.epochs=20.0" in shown
    assert main(["compare", "--recipe", "vtab-dtl", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainings"] == 19 and found["of_tasks"]["vtab-full/svhn"]["optim.lr"] == 0.005
