"""From the user's words to a frozen backbone."""

from pathlib import Path
from typing import Literal

import torch

# These imports fill the registry: one line per family.
from mdpd_deploy.backbones import hf_load as _hf  # noqa: F401
from mdpd_deploy.backbones import vit_load as _vit  # noqa: F401
from mdpd_deploy.backbones.base import Backbone, BackboneSource, weights_sha256
from mdpd_deploy.backbones.family import (
    BACKBONES,
    Family,
    LoadRequest,
    folder_config,
    local_folder,
)
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import UserError


def load_backbone(
    config: BackboneConfig,
    *,
    max_length: int = 128,
    pad: Literal["longest", "max"] = "longest",
    fake: bool = False,
    weights_file: Path | None = None,
) -> Backbone:
    """Load a backbone, frozen: fp32, eval mode, no parameter requires a gradient.

    Args:
        config: Which backbone (`name`), which weights, how it is pooled.
        max_length: Most tokens of a text, special tokens included; text only.
        pad: Pad a batch to its longest text, or always to `max_length`; text only.
        fake: Build the architecture only, for forecasts: weights are neither read nor
            initialised, and `source.sha256` is empty. Works under torch's FakeTensorMode too.
        weights_file: A safetensors file with the state of the whole `Backbone`, as a run keeps it
            when its weights cannot be loaded again; used instead of the named weights.

    Raises:
        UserError: For an unknown name, an architecture that does not fit, or weights that are
            missing, damaged or of another model.
    """
    request = LoadRequest(config, max_length, pad, fake, weights_file)
    backbone, revision = _family(config).load(request)
    if config.pooling == "cls" and not backbone.has_cls:
        raise UserError(
            f"backbone.pooling=cls: {config.name} has no class token; set backbone.pooling=mean."
        )
    backbone.pooling = config.pooling
    backbone.eval().requires_grad_(False)
    assert fake or all(p.dtype == torch.float32 for p in backbone.parameters())
    backbone.source = BackboneSource(
        name=config.name,
        revision=revision,
        sha256="" if fake else weights_sha256(backbone),
        pretrained=config.pretrained,
    )
    return backbone


def check_backbone(config: BackboneConfig) -> None:
    """Refuse a name that cannot be loaded, before data are read or weights fetched.

    Raises:
        UserError: With the nearest names where the library knows them.
    """
    _family(config).check(config)


def _family(config: BackboneConfig) -> type[Family]:
    for family in BACKBONES.values():
        if family.matches(config):
            return family
    choices = "; ".join(family.names for family in BACKBONES.values())
    folder = local_folder(config.name)
    if folder is not None:
        keys = ", ".join(sorted(folder_config(folder))[:6]) or "nothing"
        raise UserError(
            f"backbone.name: the config.json of {folder} describes no known model (it has {keys}). "
            f"Known: {choices}."
        )
    raise UserError(
        f"backbone.name={config.name!r} is neither an existing folder nor a known kind of name. "
        f"Known: {choices}."
    )
