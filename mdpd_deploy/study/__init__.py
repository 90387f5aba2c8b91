"""Studies: many trainings planned, run in child processes, and read side by side.

    plan.py      tasks × methods × learning rates × seeds, and the folder that holds them
    suites.py    groups of tasks (GLUE, VTAB-1K) and their means
    trial.py     one training in a child process
    schedule.py  the order of the trials: first the sweep of learning rates, then the seeds
    engines.py   where trials run: on this machine, or on a Ray cluster
    results.py   finished trials → one row per task and method
    table.py     rows as text: terminal and Markdown
    study_page.py  rows as a page with Pareto pictures

Nothing here trains: a trial is `mdpd train` on a config file.
"""

from mdpd_deploy.study.engines import ENGINES, build_engine
from mdpd_deploy.study.plan import PLAN, Ask, Plan, on_one_split, read_plan, write_plan
from mdpd_deploy.study.results import Latency, Results, collect
from mdpd_deploy.study.schedule import CellOutcome, run_trials
from mdpd_deploy.study.study_page import write_page
from mdpd_deploy.study.suites import expand_tasks
from mdpd_deploy.study.table import markdown, render
from mdpd_deploy.study.trial import without_places

__all__ = [
    "ENGINES",
    "PLAN",
    "Ask",
    "CellOutcome",
    "Latency",
    "Plan",
    "Results",
    "build_engine",
    "collect",
    "expand_tasks",
    "markdown",
    "on_one_split",
    "read_plan",
    "render",
    "run_trials",
    "without_places",
    "write_page",
    "write_plan",
]
