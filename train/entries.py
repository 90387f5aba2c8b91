"""Methods as a list names them: METHOD or METHOD:SIDE, and a config for each of them.

A bare side name means that side network alone (`unipt` = `side:unipt`); a method that needs a side
network and names none takes the default one (`mdpd` = `mdpd:unipt`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mdpd_deploy.config import SIDE_ALIASES, Config, SideConfig, check_config
from mdpd_deploy.config.recipes import nested, recipe_settings
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.sides import SIDES, other_side
from mdpd_deploy.sides.base import check_options as check_side_options
from mdpd_deploy.train.methods import METHODS
from mdpd_deploy.train.methods.base import check_options as check_method_options


@dataclass(frozen=True)
class Entry:
    """A method of a list.

    Attributes:
        method: A name of METHODS.
        side: A name of SIDES, None where the method has no side network.
    """

    method: str
    side: str | None = None

    @property
    def label(self) -> str:
        """The word that names it, e.g. `mdpd:unipt` or `probe`."""
        return self.method if self.side is None else f"{self.method}:{self.side}"

    @property
    def default_lr(self) -> float:
        """The method's own learning rate."""
        return METHODS[self.method].default_lr


def parse_entry(word: str) -> Entry:
    """Read one word of a list.

    Raises:
        UserError: For an unknown method or side network, or a side network that the method lacks.
    """
    name, colon, side = (part.strip() for part in word.partition(":"))
    side = SIDE_ALIASES.get(side, side)
    if not colon and name not in METHODS:
        side = SIDE_ALIASES.get(name, name)
        if side not in SIDES:
            raise unknown("method or side network", word, [*METHODS, *SIDES])
        return Entry("side", side)
    if not METHODS.get_or_raise(name).uses_side:
        if colon:
            raise UserError(f"{word}: the method {name} has no side network; write {name}.")
        return Entry(name)
    if not colon:
        side = SideConfig().name
    SIDES.get_or_raise(side)
    return Entry(name, side)


def default_entries() -> list[Entry]:
    """Return every method there is, those with a side network once for each that they can use."""
    plain = [Entry(name) for name, method in METHODS.items() if not method.uses_side]
    return plain + [
        Entry(name, side)
        for name, method in METHODS.items()
        if method.uses_side
        for side, network in SIDES.items()
        if network.has_features or not method.distils
    ]


def apply_entry(config: Config, entry: Entry) -> Config:
    """Return the config of another method; what that method would ignore is as by default."""
    if entry.side is not None:
        config = config.model_copy(update={"side": other_side(config.side, entry.side)})
    plain = Config()
    for option in METHODS[entry.method].ignored_options(config):
        section, name = option.split(".")
        value = getattr(getattr(plain, section), name)
        reset = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: reset})
    return config.model_copy(update={"method": entry.method})


def without_unread(config: Config) -> Config:
    """Return a config without what its recipe sets and its method or side network does not read."""
    side = config.side.name if METHODS.get_or_raise(config.method).uses_side else None
    asked, read = config.flat(), apply_entry(config, Entry(config.method, side)).flat()
    unread = [
        name
        for name, value, recipe in recipe_settings(config)
        if value == recipe and asked.get(name) != read.get(name)
    ]
    kept = {name: value for name, value in asked.items() if name not in unread}
    return check_config(nested(kept)) if unread else config


def check_options(config: Config) -> None:
    """Refuse an option that the config's method or side network would ignore."""
    method = METHODS.get_or_raise(config.method)
    check_method_options(method, config)
    if method.uses_side:
        check_side_options(config.side)


def entry_configs(config: Config, words: Iterable[str]) -> dict[str, Config]:
    """Return label → config of every method that the words name."""
    entries = map(parse_entry, words)
    return {entry.label: apply_entry(config, entry) for entry in entries}
