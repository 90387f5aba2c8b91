"""Recipes: the options of a paper's protocol under one name.

A recipe is a file `mdpd_deploy/recipes/NAME.yaml`: what it is and what of the paper it cannot give,
`options` by section, and `rows`, options for some tasks or backbones only. It fills in what neither
flags, `--set` nor a config file give. `A,B` takes both; where they differ, B counts.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from mdpd_deploy.config.load import check_config
from mdpd_deploy.config.options import Config, Section
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.text import listed

FOLDER = Path(__file__).parents[1] / "recipes"
WHERE = ("task", "backbone")  # the patterns of a row
OF_ONE_RUN = ("method", "side.name")  # what a comparison names in other words
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
Options = dict[str, Any]  # by dotted name


class Comparison(Section):
    """What `mdpd compare` takes from a recipe where it is not told."""

    methods: list[str] | None = None  # words of --methods
    tasks: list[str] | None = None  # words of --task
    seeds: int | None = None  # how many
    lr_factors: list[float] | None = None
    own_splits: bool = False  # every seed has training lists of its own


class Recipe(Section):
    """One protocol.

    Attributes:
        paper: Where it was published.
        table: Of its figures.
        line: What is trained, in one line.
        reproduces: Which figures are in reach, and how.
        differs: What is not as in the paper, a sentence each.
        backbones: Patterns of names, without scheme and owner; the first is the paper's.
        tasks: Patterns of tasks.
        options: By section.
        rows: `task` and `backbone`, patterns, and options by dotted name; later rows count.
        compare: For `mdpd compare`.
    """

    name: str
    paper: str
    table: str
    line: str
    reproduces: str
    differs: list[str]
    backbones: list[str]
    tasks: list[str]
    options: Options = Field(default_factory=dict)
    rows: list[Options] = Field(default_factory=list)
    compare: Comparison = Comparison()

    def options_for(self, task: str, backbone: str) -> Options:
        """Return every option that the recipe sets for a task on a backbone."""
        found = flat(self.options)
        for row in self.rows:
            asked = zip(WHERE, (task, plain_name(backbone)), strict=True)
            if all(fnmatchcase(given, row.get(key, "*")) for key, given in asked):
                found |= {name: value for name, value in row.items() if name not in WHERE}
        return found

    def fits(self, task: str) -> bool:
        """Whether it is for a task."""
        return any(fnmatchcase(task, pattern) for pattern in self.tasks)


class Setting(NamedTuple):
    """An option of a recipe in a run; `value` differs from the recipe's where it was given."""

    option: str
    value: Any
    recipe: Any


def recipe_names() -> list[str]:
    """Return the name of every recipe."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def read_recipe(name: str) -> Recipe:
    """Read a recipe; raises `UserError` with the nearest name where there is none."""
    if name not in recipe_names():
        raise unknown("--recipe", name, recipe_names())
    return Recipe(name=name, **yaml.safe_load(recipe_text(name)))


def recipe_text(name: str) -> str:
    """Return a recipe as it is written."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def recipes_of(config: Config) -> list[Recipe]:
    """Return the recipes that a config names."""
    words = [] if config.recipe is None else config.recipe.split(",")
    return [read_recipe(word.strip()) for word in words]


def is_whole(config: Config) -> bool:
    """Whether a config holds every option, as that of a run: nothing is left to fill in."""
    return Config().flat().keys() <= given_options(config).keys()


def given_options(config: Config) -> Options:
    """Return the options that someone gave, by dotted name."""
    return flat(config.model_dump(exclude_unset=True))


def recipe_options(config: Config) -> Options:
    """Return what a config's recipes say for its task on its backbone.

    `${optim.lr}` stands for another option, as the run has it. Where fewer epochs are given, warm-up
    and tail shrink with them.
    """
    found: Options = {}
    for recipe in recipes_of(config):
        named = flat(recipe.options).get("backbone.name", config.backbone.name)
        given = "name" in config.backbone.model_fields_set
        found |= recipe.options_for(config.task, config.backbone.name if given else named)
    given_too = given_options(config)
    found |= _phases(found, given_too.get("train.epochs"))
    known = found | given_too
    return {name: _resolved(value, known) for name, value in found.items()}


def with_recipe(config: Config, *, shared: bool = False) -> Config:
    """Fill in what the config's recipes say and nobody gave.

    Args:
        config: It holds what was given. One that holds every option, as that of a run, is returned
            as it is: `recipe` is then where its values came from.
        shared: For all methods and tasks of a comparison, which names these itself.

    Raises:
        UserError: For an unknown recipe, or one that is for other tasks.
    """
    if config.recipe is None or is_whole(config):
        return config
    if not shared:
        require_task(config)
    options = recipe_options(config)
    if shared:
        options = {name: value for name, value in options.items() if name not in OF_ONE_RUN}
    return check_config(nested(options | given_options(config)))


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a config with other values of some options, by dotted name."""
    return check_config(nested({**config.flat(), **options}))


def require_task(config: Config) -> None:
    """Raise `UserError` where a recipe is for other tasks than the config's, or it names none."""
    for recipe in recipes_of(config):
        if not recipe.fits(config.task):
            raise _other_task(recipe, config)


def recipe_settings(config: Config) -> tuple[Setting, ...]:
    """Return every option of a config's recipes, with the value that the run has."""
    return tuple(
        Setting(name, reduce(getattr, name.split("."), config), value)
        for name, value in recipe_options(config).items()
    )


def recipe_notes(config: Config) -> tuple[str, ...]:
    """Return a sentence where a recipe is for other backbones."""
    name = plain_name(config.backbone.name)
    return tuple(
        f"the recipe {recipe.name} is for {listed(recipe.backbones)}: with {name} its figures are "
        "not the paper's."
        for recipe in recipes_of(config)
        if not any(fnmatchcase(name, pattern) for pattern in recipe.backbones)
    )


def plain_name(backbone: str) -> str:
    """Return a backbone's name without scheme, owner or folder."""
    return backbone.rpartition(":")[2].rstrip("/").rpartition("/")[2]


def flat(plain: Mapping[str, Any]) -> Options:
    """Return options by section as options by dotted name."""
    found: Options = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            found[name] = value
    return found


def nested(options: Options) -> Options:
    """Return options by dotted name as options by section."""
    found: Options = {}
    for name, value in options.items():
        section, dot, key = name.partition(".")
        if dot:
            found.setdefault(section, {})[key] = value
        else:
            found[name] = value
    return found


def _phases(options: Options, epochs: float | None) -> Options:
    """Return the phases of a schedule in a shorter run: their share of it, and steps within epochs."""
    whole = options.get("train.epochs")
    if not epochs or not whole or epochs >= whole:
        return {}
    names = ("optim.warmup_epochs", "optim.cooldown_epochs")
    phases = {name: options[name] * epochs / whole for name in names if name in options}
    return phases | ({"optim.per_epoch": None} if "optim.per_epoch" in options else {})


def _resolved(value: object, known: Options) -> object:
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return known.get(match[1]) if match else value


def _other_task(recipe: Recipe, config: Config) -> UserError:
    asked = (
        f"--task is {config.task}" if "task" in config.model_fields_set else "no --task is given"
    )
    return UserError(
        f"the recipe {recipe.name} is for the tasks {listed(recipe.tasks)}, and {asked}: name one of "
        "these, or take another recipe (`mdpd recipes` lists them)."
    )
