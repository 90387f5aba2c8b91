"""What a user should know of a finished run before its model is used, as sentences."""

from collections.abc import Iterator, Mapping

from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.tasks.metrics import LOWER_IS_BETTER, Values, metric_text
from mdpd_deploy.train.evaluate import Outputs

SIDE = (
    "the side network, which is thrown away, is better on validation than the model that is "
    "deployed: {metric} {side} against {deployed} on {count} examples; more epochs or a larger "
    "optim.norm_lr may close the gap, and --method side keeps it, at a cost in every inference."
)
MAJORITY = (
    "the deployed model is no better on validation than always answering the most frequent class: "
    "{metric} {deployed}, and {floor} without learning."
)


def result_cautions(
    data: TaskData, metrics: Mapping[str, Values], majority: Values | None, outputs: Outputs
) -> list[str]:
    """Return a sentence for everything in the results that speaks against deploying the model.

    Args:
        data: What was trained and measured on.
        metrics: On validation, of `deployed` and, where it is thrown away, `side`.
        majority: What the most frequent class scores; None where it is unknown.
        outputs: `output` of the deployed model on validation [n, C].
    """
    return [*_worse(data, metrics, majority), *_never_predicted(data, outputs)]


def _worse(data: TaskData, metrics: Mapping[str, Values], majority: Values | None) -> Iterator[str]:
    name = data.metrics[0]
    deployed, side = metrics["deployed"][name], metrics.get("side", {}).get(name)
    floor = None if majority is None else majority[name]
    words = {
        "metric": name,
        "deployed": metric_text(deployed),
        "side": metric_text(side),
        "floor": metric_text(floor),
        "count": f"{len(data.evaluation['validation']):,}",
    }
    sign = -1 if name in LOWER_IS_BETTER else 1
    if side is not None and (deployed is None or sign * side > sign * deployed):
        yield SIDE.format(**words)
    if floor is not None and (deployed is None or sign * deployed <= sign * floor):
        yield MAJORITY.format(**words)


def _never_predicted(data: TaskData, outputs: Outputs) -> Iterator[str]:
    labels = data.evaluation["validation"].labels
    if never := data.task.unsaid(labels, outputs["output"]):
        yield f"the deployed model never answers, on validation: {never}."
