"""Training methods: what is trained, one step of it, and what the deployed model needs.

Adding a method is one file here and an import below; an adapter or virtual tokens of
`mdpd_deploy.adapters` are a method already.
"""

from mdpd_deploy.train.methods import direct, mdpd, norms, peft, side
from mdpd_deploy.train.methods.base import METHODS, Method, build_method
from mdpd_deploy.train.methods.batch import Batch

__all__ = [
    "METHODS",
    "Batch",
    "Method",
    "build_method",
    "direct",
    "mdpd",
    "norms",
    "peft",
    "side",
]
