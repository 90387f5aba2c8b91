"""Tasks: one file each; adding one is a file and an import here. Torch is imported when asked for."""

from mdpd_deploy.tasks.base import KINDS, Answers, Prediction, Targets, Task, task_of
from mdpd_deploy.tasks.classify import Classify
from mdpd_deploy.tasks.regress import Regress

__all__ = [
    "KINDS",
    "Answers",
    "Classify",
    "Prediction",
    "Regress",
    "Targets",
    "Task",
    "task_of",
]
