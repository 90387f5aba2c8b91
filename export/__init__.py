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
    from mdpd_deploy.export.multi import pack_multi
    from mdpd_deploy.export.packing import ExportOptions, Format, pack
    from mdpd_deploy.export.precision.forms import AUTO, Form, form_of, forms_for, place_of
    from mdpd_deploy.export.recipe import engine_required, read_recipe
    from mdpd_deploy.export.swap_engine import build_swap
    from mdpd_deploy.export.trials import Race
    from mdpd_deploy.export.triton import write_repository
    from mdpd_deploy.export.triton_config import TritonOptions

_HOME = {
    "AUTO": "precision.forms",
    "EngineOptions": "engine_options",
    "ExportOptions": "packing",
    "Form": "precision.forms",
    "Format": "packing",
    "Installed": "engine_install",
    "Race": "trials",
    "TritonOptions": "triton_config",
    "build_alike": "engine_install",
    "build_swap": "swap_engine",
    "engine_required": "recipe",
    "form_of": "precision.forms",
    "forms_for": "precision.forms",
    "install_engine": "engine_install",
    "pack": "packing",
    "pack_multi": "multi",
    "place_of": "precision.forms",
    "read_recipe": "recipe",
    "unavailable_reason": "engine_install",
    "write_repository": "triton",
}

__all__ = [
    "AUTO",
    "EngineOptions",
    "ExportOptions",
    "Form",
    "Format",
    "Installed",
    "Race",
    "TritonOptions",
    "build_alike",
    "build_swap",
    "engine_required",
    "form_of",
    "forms_for",
    "install_engine",
    "pack",
    "pack_multi",
    "place_of",
    "read_recipe",
    "unavailable_reason",
    "write_repository",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
