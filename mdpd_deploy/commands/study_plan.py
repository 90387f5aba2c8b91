"""What a comparison runs: from the words of `mdpd compare` to a plan in its folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdpd_deploy.commands.options import SharedWords
from mdpd_deploy.commands.verb import fields_of, split_words
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.config import Config
    from mdpd_deploy.config.recipes import Comparison
    from mdpd_deploy.study.plan import Ask, OfTasks, Plan

METHODS = "probe,norms,bitfit,lora,full,unipt,mdpd:unipt"
DEFAULT_FACTORS = (0.3, 1, 3)
FACTORS = ",".join(map(str, DEFAULT_FACTORS))
SHARED = ("task", "method", "out", "side.name", "train.seed", "train.steps", "train.epochs",
          "train.batch", "train.accumulate", "train.device")  # fmt: skip


def shared_config(
    config: Path | str | Config | None,
    sets: Sequence[str],
    words: Mapping[str, Any],
    *,
    guess: bool = False,
) -> tuple[Config, list[str]]:
    """Return what was given for all trials, and the tasks where --task names none.

    These are the config's task, or the recipe's, or with `guess` that of the data.
    """
    from mdpd_deploy.commands.run_config import build_config, with_task
    from mdpd_deploy.config import Config

    fields_of(SharedWords, words, "compare")  # the others of `mdpd train` differ between methods
    plain = Config()
    base = build_config(config, sets, words, guess=False, recipe=False)
    tasks = None if "task" in base.model_fields_set else recipe_comparison(base).tasks
    if guess and not tasks:
        base = with_task(base)
    for name in ("method", "out", "side.name"):
        if base.flat()[name] != plain.flat()[name]:
            raise UserError(
                f"{name}={base.flat()[name]} is no option of all methods: leave it out, and name "
                "methods in --methods (METHOD:SIDE) and the folder in --out."
            )
    return base.model_copy(update={"task": plain.task}), tasks or [base.task]


def recipe_comparison(base: Config) -> Comparison:
    """Return what the recipes say of a comparison; where they differ, the last one counts."""
    from mdpd_deploy.config.recipes import Comparison, recipes_of

    found = Comparison()
    for recipe in recipes_of(base):
        said = {name: getattr(recipe.compare, name) for name in recipe.compare.model_fields_set}
        found = found.model_copy(update=said)
    return found


def asked_plan(
    folder: Path,
    base: Config,
    methods: Sequence[str] | None,
    tasks: Sequence[str],
    seeds: int | None,
    lr_factors: Sequence[float] | None,
    say: Callable[[str], None],
    *,
    unread: bool = False,
) -> Plan:
    """Return what was asked for now, added to what the folder's comparison already is.

    Args:
        folder: Of the comparison.
        base: From `shared_config`.
        methods: Words of --methods; None means the recipe's or the usual ones.
        tasks: Words of --task.
        seeds: How many, from `train.seed` on; None means as the recipe says, or one.
        lr_factors: Of each method's own learning rate; None means the recipe's or the usual ones.
        say: Takes a line for each task or method that is left out.
        unread: Take tasks by their names where no data are named.

    Raises:
        UserError: For words that mean nothing, or a folder of other trainings.
    """
    from mdpd_deploy.config.recipes import with_recipe
    from mdpd_deploy.study.plan import PLAN, Ask, on_one_split, read_plan
    from mdpd_deploy.study.suites import SUITES, expand_tasks, suite_members
    from mdpd_deploy.study.trial import without_places

    said, given = recipe_comparison(base), base
    base = with_recipe(base, shared=True)
    base = base if said.own_splits else on_one_split(base)
    methods = said.methods if methods is None else methods
    factors = tuple(dict.fromkeys(map(float, lr_factors or said.lr_factors or DEFAULT_FACTORS)))
    earlier: tuple[Ask, ...] = ()
    own: OfTasks = {}
    if (folder / PLAN).is_file():
        stored, earlier, own = read_plan(folder)
        _refuse_difference(folder, stored, base)
    left_out: list[str] = []

    def leave_out(line: str) -> None:
        say(line)
        left_out.append(without_places(line, base))

    labels = method_labels(base, methods, leave_out)
    if unread and base.data.path is None:
        named = [t for w in tasks for t in (suite_members(w, None) if w in SUITES else [w])]
    else:
        named = expand_tasks(tasks, base, leave_out)
    named = _of_recipes(base, named, tasks, leave_out)
    full = [task for task in named if task.startswith("vtab-full/")]
    if full and (len(factors) > 1 or base.train.keep != "last"):
        raise UserError(
            f"{full[0]} trains on its validation pictures too, so they can choose neither a rate "
            "nor the best weights: find the factor on vtab/NAME, then add --lr-factors FACTOR "
            "--set train.keep=last."
        )
    first = base.train.seed
    numbers = tuple(range(first, first + (seeds or said.seeds or 1)))
    ask = Ask(tuple(named), tuple(labels), factors, numbers, tuple(left_out))
    asks = earlier if ask in earlier else (*earlier, ask)
    return _plan(base, asks, {**own, **options_of_tasks(given, named)})


def _of_recipes(
    base: Config, tasks: Sequence[str], asked: Sequence[str], say: Callable[[str], None]
) -> list[str]:
    """Leave out the tasks of a suite that a recipe is not for."""
    from mdpd_deploy.config.recipes import recipes_of

    found = []
    for task in tasks:
        others = [recipe.name for recipe in recipes_of(base) if not recipe.fits(task)]
        if others and task not in asked:
            say(f"{task} is left out: the recipe {others[0]} is not for it.")
        else:
            found.append(task)
    return found


def options_of_tasks(given: Config, tasks: Sequence[str]) -> OfTasks:
    """Return what the recipes say of each task beyond what all share.

    Args:
        given: From `shared_config`.
        tasks: Names of tasks.

    Raises:
        UserError: For a task that the recipes are not for.
    """
    from mdpd_deploy.config.recipes import require_task, with_recipe

    shared = with_recipe(given, shared=True).flat()
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        of_task = given.model_copy(update={"task": task})
        require_task(of_task)
        options = with_recipe(of_task, shared=True).flat().items()
        own = {name: value for name, value in options if value != shared.get(name)}
        if own.keys() - {"task"}:
            found[task] = {name: value for name, value in own.items() if name != "task"}
    return found


def stored_plan(folder: Path) -> Plan:
    """Return the plan of a folder that `mdpd compare` wrote."""
    from mdpd_deploy.study.plan import read_plan

    return _plan(*read_plan(folder))


def method_labels(
    base: Config, words: Sequence[str] | None, say: Callable[[str], None]
) -> list[str]:
    """Return the labels of the methods that words name.

    `all` means every method that fits the backbone; a line says which one does not, and why. One
    that is named itself stays, to be reported as a row.
    """
    from mdpd_deploy.train import reason_against

    chosen = split_words(METHODS) if words is None else list(words)
    if not chosen:
        raise UserError("--methods names none: leave it out for the usual ones.")
    named = method_configs(base, [word for word in chosen if word != "all"])[0]
    fitting = []
    for label, config in method_configs(base, expand_all(chosen))[0].items():
        reason = None if label in named else reason_against(config)
        if reason is None:
            fitting.append(label)
        else:
            say(f"{label} is left out: {reason}")
    return fitting


def expand_all(words: Sequence[str]) -> list[str]:
    """Return words of --methods with every method there is in the place of `all`."""
    from mdpd_deploy.train import default_entries

    every = [entry.label for entry in default_entries()]
    return [label for word in words for label in (every if word == "all" else [word])]


def _plan(base: Config, asks: tuple[Ask, ...], of_tasks: OfTasks) -> Plan:
    from mdpd_deploy.config.recipes import with_options
    from mdpd_deploy.study.plan import Plan

    labels = list(dict.fromkeys(method for ask in asks for method in ask.methods))
    special: dict[tuple[str, str], tuple[Config, float]] = {}
    for task, own in of_tasks.items():
        configs, rates = method_configs(with_options(base, own), labels)
        special |= {(task, label): (configs[label], rates[label]) for label in labels}
    return Plan(base, asks, *method_configs(base, labels), of_tasks, special)


def method_configs(
    base: Config, words: Sequence[str]
) -> tuple[dict[str, Config], dict[str, float]]:
    """Return label → config and label → learning rate of the methods that the words name."""
    from mdpd_deploy.commands.run_config import build_config
    from mdpd_deploy.train import apply_entry, check_options, parse_entry

    configs: dict[str, Config] = {}
    rates: dict[str, float] = {}
    for word in words:
        name, *options = re.split(r"\+(?=[\w.]+=)", word)
        entry = parse_entry(name)
        label = "+".join((entry.label, *options))
        plain = apply_entry(base, entry)
        configs[label] = build_config(plain, options, {}, recipe=False)
        _refuse_other_data(label, plain, configs[label])
        check_options(configs[label])
        rates[label] = configs[label].optim.lr or entry.default_lr
    return configs, rates


def _refuse_other_data(label: str, base: Config, config: Config) -> None:
    """Refuse options of one method that would make it incomparable with the others."""
    before = base.flat()
    for name, value in config.flat().items():
        shared = name in SHARED or name.startswith(("data.", "backbone."))
        if shared and value != before[name]:
            raise UserError(
                f"--methods {label}: {name} is the same for all methods; set it for all with --set."
            )


def _refuse_difference(folder: Path, stored: Config, base: Config) -> None:
    before, now = stored.flat(), base.flat()
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"--out {folder} holds a comparison with {name}={before.get(name)}, and this one "
                f"has {name}={value}: choose another folder."
            )
