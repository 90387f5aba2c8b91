"""What a report shows of scores: scatter charts and errors."""

import numpy as np

from mdpd_deploy.report.charts import scatter_chart
from mdpd_deploy.report.page import Html, section, tag
from mdpd_deploy.report.predictions import Predictions, TaskPage
from mdpd_deploy.tasks.base import Answers


class ScorePage(TaskPage):
    """Predictions of a score."""

    samples_note = "The largest errors first, then examples spread over the evaluation data."

    def outcome(self, predictions: Predictions) -> Html:
        """Draw predictions against labels."""
        labels = np.asarray(predictions.labels, dtype=float)
        said = predictions.deployed[:, 0]
        chart = scatter_chart(labels, said, x_label="label", y_label="deployed prediction")
        return section(
            predictions.titled("Predictions against labels"),
            tag("div", Html(chart), class_="wide-chart"),
            note="One dot per evaluation example; on the dashed line the prediction is exact.",
        )

    def agreement(self, predictions: Predictions, side: Answers) -> Html:
        """Draw the deployed model's scores against the side network's."""
        deployed, other = predictions.deployed[:, 0], side[:, 0]
        gap = np.abs(deployed - other)
        varied = len(gap) > 1 and deployed.std() > 0 and other.std() > 0
        related = f"{np.corrcoef(deployed, other)[0, 1]:.3f}" if varied else "undefined"
        chart = scatter_chart(other, deployed, x_label="side", y_label="deployed")
        return section(
            predictions.titled("Agreement of side network and deployed model"),
            tag("div", Html(chart), class_="wide-chart"),
            note=f"Correlation {related}; mean difference {gap.mean():.4g}, largest "
            f"{gap.max():.4g}.",
        )

    def verdict(self, label: float, output: Answers) -> list[Html | None]:
        """Say the score and the label."""
        return [tag("div", f"predicted {output[0]:.4g}"), tag("small", f"label {label:.4g}")]
