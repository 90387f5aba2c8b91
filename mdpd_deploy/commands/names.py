"""The names that a run can have, known before torch is loaded: a typing mistake is answered at once.

The registries stay the truth; `tests/test_names.py` holds these lists to them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from mdpd_deploy.config import Config

METHODS = (
    "mdpd", "side", "norms", "probe", "bitfit", "full",
    "lora", "adalora", "ia3", "prompt", "prefix",
)  # fmt: skip
SIDES = ("unipt", "sherl", "lst", "dtlv1", "dtlv2", "dtlv2-ls")
BACKBONES = ("builtin:", "timm:", "hf:")


def check_names(config: Config) -> None:
    """Refuse a task, method, side network or kind of backbone that does not exist.

    Raises:
        UserError: With the nearest name.
    """
    from mdpd_deploy.data.load import find_reader

    if "torch" not in sys.modules:  # else more may be registered, and the registries answer soon
        if config.method not in METHODS:
            raise unknown("method (--method)", config.method, METHODS)
        if config.side.name not in SIDES:
            raise unknown("side.name (--side)", config.side.name, SIDES)
    find_reader(config.task)
    name = config.backbone.name
    if not (name.startswith(BACKBONES) or Path(name).expanduser().is_dir()):
        raise UserError(
            f"backbone.name={name!r} is neither an existing folder nor a known kind of name. "
            f"Known: {', '.join(f'{scheme}NAME' for scheme in BACKBONES)}, or a local folder."
        )
