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
    from mdpd_deploy.export.recipe import SCRIPT_FILE, engine_unavailable
    from mdpd_deploy.export.triton import write_repository
    from mdpd_deploy.export.triton_config import TritonOptions

_HOME = {
    "SCRIPT_FILE": "recipe",
    "ExportOptions": "packing",
    "Format": "packing",
    "TritonOptions": "triton_config",
    "engine_unavailable": "recipe",
    "pack": "packing",
    "pack_multi": "multi",
    "write_repository": "triton",
}

__all__ = [
    "SCRIPT_FILE",
    "ExportOptions",
    "Format",
    "TritonOptions",
    "engine_unavailable",
    "pack",
    "pack_multi",
    "write_repository",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
