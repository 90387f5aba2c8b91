"""`classify`: one of several classes."""

from mdpd_deploy.tasks.classify.task import Classify, ClassPrediction

__all__ = ["ClassPrediction", "Classify"]
