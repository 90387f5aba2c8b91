"""Export: drop the side network, trace to ONNX, verify, and write the bundle."""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "mdpd_deploy.export":
    raise ImportError(
        f"import mdpd_deploy.export, not {__name__!r}: pyproject.toml maps the folder"
    )

if TYPE_CHECKING:
    from mdpd_deploy.export.multi import pack_multi
    from mdpd_deploy.export.packing import ExportOptions, Format, pack
    from mdpd_deploy.export.precision.forms import AUTO, Form, form_of, forms_for, place_of
    from mdpd_deploy.export.recipe import SCRIPT_FILE, engine_unavailable
    from mdpd_deploy.export.trials import Race

_HOME = {
    "AUTO": "precision.forms",
    "SCRIPT_FILE": "recipe",
    "ExportOptions": "packing",
    "Form": "precision.forms",
    "Format": "packing",
    "Race": "trials",
    "engine_unavailable": "recipe",
    "form_of": "precision.forms",
    "forms_for": "precision.forms",
    "pack": "packing",
    "pack_multi": "multi",
    "place_of": "precision.forms",
}

__all__ = [
    "AUTO",
    "SCRIPT_FILE",
    "ExportOptions",
    "Form",
    "Format",
    "Race",
    "engine_unavailable",
    "form_of",
    "forms_for",
    "pack",
    "pack_multi",
    "place_of",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
