"""Registries: plain dicts filled by a decorator; a taken name is an error."""

from collections.abc import Callable
from typing import TypeVar

from mdpd_deploy.errors import unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """Names a user may type, mapped to what builds the thing.

    Args:
        what: How error messages name the option, e.g. `"side.name"`.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that files an object under one or more names."""

        def file(item: T) -> T:
            for name in names:
                if name in self:
                    raise ValueError(f"{self.what}: the name {name!r} is taken by {self[name]!r}")
                self[name] = item
            return item

        return file

    def get_or_raise(self, name: str) -> T:
        """Look a name up; raises `UserError` naming the choices when it is unknown."""
        try:
            return self[name]
        except KeyError:
            raise unknown(self.what, name, self) from None
