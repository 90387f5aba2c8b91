"""From the words of `mdpd train` to the checked config of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdpd_deploy.commands.options import TrainWords
from mdpd_deploy.commands.verb import fields_of, split_words
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.config import Config

log = logging.getLogger(__name__)


def build_config(
    config: Path | str | Config | None,
    sets: Sequence[str],
    words: Mapping[str, Any],
    *,
    guess: bool = True,
    recipe: bool = True,
) -> Config:
    """Return the checked config that a file, `--set` assignments and words mean together.

    Args:
        config: A config file, a `Config`, or data, which is the same as `data` among the words.
        sets: Assignments.
        words: Those of `TrainWords`.
        guess: Settle the task by the data where nothing names it.
        recipe: Fill in what the recipe says and nothing else does.
    """
    from mdpd_deploy.config import Config, check_config, load_config
    from mdpd_deploy.config.recipes import is_whole, with_recipe

    config, words = _data_in_front(config, words)
    named = fields_of(TrainWords, words, "fit")
    for name, value in named.items():
        if name == "data.text" and isinstance(value, str):
            named[name] = split_words(value)
        elif isinstance(value, Path):
            named[name] = str(value)
    if isinstance(config, Config):
        given = load_config(None, named, list(sets)).model_dump(exclude_unset=True)
        loaded = check_config(_merged(config.model_dump(exclude_unset=True), given))
    else:
        loaded = load_config(None if config is None else Path(config), named, list(sets))
    if words.get("recipe") is not None and is_whole(loaded):
        raise UserError(
            f"{config} holds every option, so that --recipe has nothing to fill in: leave one out."
        )
    loaded = with_task(loaded) if guess else loaded
    return _absolute(with_recipe(loaded) if recipe else loaded)


def _data_in_front(
    config: Path | str | Config | None, words: Mapping[str, Any]
) -> tuple[Path | str | Config | None, Mapping[str, Any]]:
    """Take `mdpd train FOLDER` for `mdpd train --data FOLDER`."""
    from mdpd_deploy.data.guess import is_data

    if not isinstance(config, Path | str) or not is_data(str(config)):
        return config, words
    if words.get("data") is not None:
        raise UserError(
            f"{config} and --data {words['data']} both name data: give one, or a CONFIG.yaml first."
        )
    return None, {**words, "data": str(config)}


def with_task(config: Config) -> Config:
    """Settle the task by the data where nothing names it."""
    from mdpd_deploy.config.recipes import require_task
    from mdpd_deploy.data.guess import guess_task

    if "task" in config.model_fields_set or config.data.path is None:
        return config
    require_task(config)
    task = guess_task(config.data)
    log.info("task: %s, by what %s holds (--task says otherwise)", task, config.data.path)
    return config.model_copy(update={"task": task})


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _absolute(config: Config) -> Config:
    """Store local paths absolute, so that a run can be resumed from anywhere."""
    data = config.data.model_copy(
        update={
            name: _local(value)
            for name in ("path", "eval_path")
            if (value := getattr(config.data, name)) is not None and not value.startswith("hub:")
        }
    )
    update: dict[str, Any] = {}
    if Path(config.backbone.name).expanduser().is_dir():
        update["name"] = _local(config.backbone.name)
    if config.backbone.weights is not None:
        update["weights"] = _local(config.backbone.weights)
    backbone = config.backbone.model_copy(update=update)
    return config.model_copy(update={"data": data, "backbone": backbone})


def _local(path: str) -> str:
    return str(Path(path).expanduser().resolve())
