"""The options of a run (`options`), how a file and the command line become one config (`load`), and the
papers' protocols (`recipes`).
"""

from mdpd_deploy.config.load import check_config, load_config, read_config
from mdpd_deploy.config.options import (
    FORMER_DEFAULTS,
    SIDE_ALIASES,
    BackboneConfig,
    Config,
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimConfig,
    PeftConfig,
    SideConfig,
)

__all__ = [
    "FORMER_DEFAULTS",
    "SIDE_ALIASES",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "LossConfig",
    "OptimConfig",
    "PeftConfig",
    "SideConfig",
    "check_config",
    "load_config",
    "read_config",
]
