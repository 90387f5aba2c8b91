"""What a backbone family offers the loader, and the registry of families."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry


@dataclass(frozen=True)
class LoadRequest:
    """Everything a family needs to build one backbone.

    Attributes:
        config: The user's options.
        max_length: Most tokens of a text, special tokens included; unused by vision families.
        pad: N is that of a batch's longest text, or always `max_length`.
        fake: Build the architecture only: no weights are read or initialised.
        weights: The whole state of a `Backbone` as it was saved with a run, or None.
    """

    config: BackboneConfig
    max_length: int = 128
    pad: Literal["longest", "max"] = "longest"
    fake: bool = False
    weights: Path | None = None


class Family(ABC):
    """One kind of backbone: which names mean it, and how to load it.

    Attributes:
        names: The names it answers to, for messages.
    """

    names: ClassVar[str]

    @classmethod
    @abstractmethod
    def matches(cls, config: BackboneConfig) -> bool:
        """Tell whether `config.name` means this family; reads at most a folder's config.json."""

    @classmethod  # noqa: B027  # some know only when they load
    def check(cls, config: BackboneConfig) -> None:
        """Refuse a name that cannot be loaded, as far as that is known without reading weights."""

    @classmethod
    @abstractmethod
    def load(cls, request: LoadRequest) -> tuple[Backbone, str | None]:
        """Build the backbone in fp32; return it with the revision of its weights, if known."""


BACKBONES: Registry[type[Family]] = Registry("backbone.name (--backbone)")


def local_folder(name: str) -> Path | None:
    """Return the folder that a name points to, with or without `hf:`; None if there is none."""
    for candidate in (name, name.removeprefix("hf:")):
        path = Path(candidate).expanduser()
        if candidate and path.is_dir():
            return path
    return None


def folder_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises:
        UserError: If it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"the backbone folder {folder} has no config.json: name a folder saved by timm's or "
            "transformers' own save function."
        ) from None
    except (OSError, ValueError, RecursionError) as err:
        raise UserError(f"{path} is not readable JSON ({err}): take it from a sound copy.") from err
    if not isinstance(plain, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(plain).__name__}.")
    return plain
