"""Export: drop the side network, trace to ONNX, verify, and write the bundle."""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "mdpd_deploy.export":
    raise ImportError(
        f"import mdpd_deploy.export, not {__name__!r}: pyproject.toml maps the folder"
    )

if TYPE_CHECKING:
    from mdpd_deploy.export.engine_install import (
        Installed,
        build_alike,
        install_engine,
        unavailable_reason,
    )
    from mdpd_deploy.export.engine_options import EngineOptions
    from mdpd_deploy.export.packing import ExportOptions, Format, pack
    from mdpd_deploy.export.recipe import engine_required, read_recipe

_HOME = {
    "EngineOptions": "engine_options",
    "ExportOptions": "packing",
    "Format": "packing",
    "Installed": "engine_install",
    "build_alike": "engine_install",
    "engine_required": "recipe",
    "install_engine": "engine_install",
    "pack": "packing",
    "read_recipe": "recipe",
    "unavailable_reason": "engine_install",
}

__all__ = [
    "EngineOptions",
    "ExportOptions",
    "Format",
    "Installed",
    "build_alike",
    "engine_required",
    "install_engine",
    "pack",
    "read_recipe",
    "unavailable_reason",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
