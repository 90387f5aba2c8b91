"""Fine-tuning: methods, the norm-gradient engine, the loop, and the run directory it writes.

Names are loaded on first use: most of them bring torch, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "mdpd_deploy.train":
    raise ImportError(f"import mdpd_deploy.train, not {__name__!r}: pyproject.toml maps the folder")

if TYPE_CHECKING:
    from mdpd_deploy.train.entries import (
        Entry,
        apply_entry,
        check_options,
        default_entries,
        entry_configs,
        parse_entry,
    )
    from mdpd_deploy.train.fit import Plan, fit_run, make_plan, resume_run
    from mdpd_deploy.train.memory.forecast import reason_against
    from mdpd_deploy.train.memory.table import MemoryRow, forecast_methods

_HOME = {
    "entries": (
        "Entry",
        "apply_entry",
        "check_options",
        "default_entries",
        "entry_configs",
        "parse_entry",
    ),
    "fit": ("Plan", "fit_run", "make_plan", "resume_run"),
    "memory.forecast": ("reason_against",),
    "memory.table": ("MemoryRow", "forecast_methods"),
}

__all__ = [
    "Entry",
    "MemoryRow",
    "Plan",
    "apply_entry",
    "check_options",
    "default_entries",
    "entry_configs",
    "fit_run",
    "forecast_methods",
    "make_plan",
    "parse_entry",
    "reason_against",
    "resume_run",
]

if not TYPE_CHECKING:  # so that type checkers report a name that does not exist

    def __getattr__(name: str) -> object:
        for module, names in _HOME.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{module}"), name)
                globals()[name] = value  # the next look-up finds it without this function
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
