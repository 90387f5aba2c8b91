"""A config from a file, `--set` assignments and flags, checked.

They are merged by OmegaConf and handed to pydantic at once; nothing past this module sees an
OmegaConf object. Flags override `--set`, which overrides the file, which overrides the defaults.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, TupleConfig
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mdpd_deploy.config.options import Config
from mdpd_deploy.errors import UserError, printable
from mdpd_deploy.text import require_unicode


def load_config(
    file: Path | None = None, flags: dict[str, Any] | None = None, sets: list[str] | None = None
) -> Config:
    """Merge defaults, a YAML file, `--set` assignments and flags into one checked config.

    Args:
        file: A YAML file with any subset of the options.
        flags: Dotted option name to value, e.g. `{"optim.lr": 1e-3}`; None values are skipped.
        sets: Assignments as typed after `--set`, e.g. `["optim.lr=1e-3"]`.

    Raises:
        UserError: For an unreadable file, an unknown option or a value of the wrong kind.
    """
    merged: DictConfig | ListConfig | TupleConfig = OmegaConf.create()
    try:
        if file is not None:
            loaded = OmegaConf.load(file)
            if not isinstance(loaded, DictConfig):
                raise UserError(f"{file} must hold `name: value` lines.")
            _refuse_resolvers(OmegaConf.to_container(loaded), file)  # a merge may resolve
            merged = OmegaConf.merge(merged, loaded)
        assigned = OmegaConf.from_dotlist(sets or [])
        _refuse_resolvers(OmegaConf.to_container(assigned), "--set")
        merged = OmegaConf.merge(merged, assigned)
        plain = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise UserError(f"the config file {file} does not exist.") from None
    except RecursionError:
        raise UserError(
            f"the options are nested too deeply ({file or '--set'}): they have two levels."
        ) from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as err:
        reason = _first_line(err)
        raise UserError(f"the options could not be read ({file or '--set'}): {reason}") from err
    assert isinstance(plain, dict)
    for name, value in (flags or {}).items():
        if value is not None:
            _put(plain, name.split("."), value)
    return check_config(plain)


_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")  # ${train.batch}: another option of the file


def _refuse_resolvers(value: object, where: Path | str) -> None:
    """Refuse `${oc.env:NAME}` and all that reads or computes: a config may come from a stranger.

    What a variable holds would go into the run's config.yaml, its report and messages.
    """
    if isinstance(value, dict):
        for item in value.values():
            _refuse_resolvers(item, where)
    elif isinstance(value, list):
        for item in value:
            _refuse_resolvers(item, where)
    elif isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise UserError(
            f"{where}: {printable(value)[:80]!r} asks for more than another option, and "
            "a config reads nothing from its surroundings: write the value itself, or give it by "
            "--set or a flag."
        )


def _put(plain: dict[Any, Any], path: list[str], value: Any) -> None:
    """Set a flag's option; a section that is no section stays for the check to name."""
    for part in path[:-1]:
        section = plain.setdefault(part, {})
        if not isinstance(section, dict):
            return
        plain = section
    plain[path[-1]] = value


def read_config(path: Path) -> Config:
    """Read a config that `to_yaml` wrote: nothing in it is interpolated.

    Raises:
        UserError: If it is missing, damaged, or of another version.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: it is no config of mdpd.") from None
    except (OSError, ValueError, yaml.YAMLError) as err:  # ValueError: no UTF-8, no number or date
        raise UserError(f"{path} cannot be read ({_first_line(err)}).") from err
    if not isinstance(plain, dict):
        raise UserError(f"{path} must hold `name: value` lines.")
    return check_config(plain)


def _first_line(err: Exception) -> str:
    """Say what is wrong, and at which line of the YAML where that is known."""
    reason = str(err).splitlines()[0].split(";")[0]
    if not isinstance(err, yaml.MarkedYAMLError) or err.problem_mark is None:
        return reason
    return f"line {err.problem_mark.line + 1}: {err.problem or reason}"


def check_config(plain: dict[Any, Any]) -> Config:
    """Validate a plain dict; raises `UserError` with the option's path and the mend."""
    try:
        config = Config.model_validate(plain)
    except ValidationError as err:
        raise UserError(_first_problem(err)) from None
    for name, value in config.flat().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                require_unicode(text, f"option {name}:")
    return config


def _first_problem(err: ValidationError) -> str:
    problem = err.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in problem["loc"][:-1]:
            found = section.model_fields[str(part)].annotation
            section = found if isinstance(found, type) else Config
        near = get_close_matches(str(problem["loc"][-1]), section.model_fields, n=1)
        mend = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown option {path!r}.{mend} Known here: {', '.join(section.model_fields)}."
    message = problem["msg"].removeprefix("Value error, ")
    return f"option {path or 'config'}: {message} (given {problem['input']!r})."
