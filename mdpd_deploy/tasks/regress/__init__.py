"""`regress`: a number."""

from mdpd_deploy.tasks.regress.task import Regress, ScorePrediction

__all__ = ["Regress", "ScorePrediction"]
