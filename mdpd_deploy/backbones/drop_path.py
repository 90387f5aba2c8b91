"""Stochastic depth (`backbone.drop_path`): whether a model has any."""

from torch import nn

from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import UserError


def check_drop_path(model: nn.Module, config: BackboneConfig) -> None:
    """Refuse a rate that a model was built with and has no place for.

    Raises:
        UserError: If none of its parts drops a path.
    """
    parts = (part for part in model.modules() if type(part).__name__.endswith("DropPath"))
    if config.drop_path and not any(vars(part).get("drop_prob") for part in parts):
        raise no_drop_path(config.name)


def no_drop_path(name: str) -> UserError:
    """Return the refusal of a model without stochastic depth."""
    return UserError(f"backbone.drop_path: {name} drops no paths: leave it out.")
