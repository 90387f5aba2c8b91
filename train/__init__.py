"""Fine-tuning: methods, the norm-gradient engine, the loop, and the run directory it writes."""

if __name__ != "mdpd_deploy.train":
    raise ImportError(f"import mdpd_deploy.train, not {__name__!r}: pyproject.toml maps the folder")

from mdpd_deploy.train.entries import (
    Entry,
    apply_entry,
    check_options,
    default_entries,
    entry_configs,
    parse_entry,
)
from mdpd_deploy.train.fit import Plan, fit_run, make_plan, resume_run
from mdpd_deploy.train.forecast import reason_against
from mdpd_deploy.train.memory_table import MemoryRow, forecast_methods

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
