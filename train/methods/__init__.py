"""Training methods: what is trained, one step of it, and what the deployed model needs.

Adding a method is one file here, an import below, and a row in the tests.
"""

from mdpd_deploy.train.methods import (
    adalora,
    adapters,
    direct,
    mdpd,
    norms,
    probe,
    side,
    tokens,
)
from mdpd_deploy.train.methods.base import METHODS, Batch, Method, TaskSpec, build_method

__all__ = [
    "METHODS",
    "Batch",
    "Method",
    "TaskSpec",
    "adalora",
    "adapters",
    "build_method",
    "direct",
    "mdpd",
    "norms",
    "probe",
    "side",
    "tokens",
]
