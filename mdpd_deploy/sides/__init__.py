"""Side networks: one file each; adding one is a file and an import here."""

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides import dtl, lst, sherl, unipt
from mdpd_deploy.sides.base import (
    SIDES,
    FrozenBlocks,
    SideNetwork,
    SideOutput,
    SideShape,
    check_options,
    other_side,
)
from mdpd_deploy.sides.sherl_maps import MapSHERL
from mdpd_deploy.sides.unipt_maps import MapUniPT

FOR_STAGES: dict[str, type[SideNetwork]] = {"sherl": MapSHERL, "unipt": MapUniPT}

__all__ = [
    "SIDES",
    "FrozenBlocks",
    "SideNetwork",
    "SideOutput",
    "SideShape",
    "build_side",
    "dtl",
    "lst",
    "other_side",
    "sherl",
    "unipt",
]


def build_side(
    backbone: Backbone, config: SideConfig, *, last_feature: bool = False
) -> SideNetwork:
    """Build the side network that `config` names beside a backbone, with fresh weights.

    Args:
        backbone: What it will stand beside.
        config: Name, reduction, variant.
        last_feature: The side head will read s_L (`distill.side_head=paper`, MDPD Eq. 3).

    Raises:
        UserError: If the name is unknown, an option does not fit, or there is no s_L to read.
    """
    backbone.require_taps(f"--side {config.name}")
    shape = SideShape.of(backbone)
    kind = SIDES.get_or_raise(config.name)
    check_options(config)
    if len(shape.stages) > 1:
        kind = FOR_STAGES.get(config.name, kind)
    side = kind.build(shape, config)
    side.readout = config.readout
    ends_in_norm = len(shape.stages) == 1 and backbone.final_norm() is not None
    if config.readout == "released" and not (ends_in_norm and backbone.pooling == "mean"):
        raise UserError(
            "side.readout=released averages tokens before the final norm: it needs a plain "
            "transformer that ends in a norm, and backbone.pooling=mean."
        )
    if last_feature and not side.has_last:
        raise UserError(
            f"distill.side_head=paper reads the side feature of the last layer, and "
            f"--side {config.name} has none; use distill.side_head=final."
        )
    if last_feature:
        side.read_feature()
    return side
