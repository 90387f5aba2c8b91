"""What a user should know of a finished run before its model is used, as sentences."""

from collections.abc import Iterator, Mapping

from mdpd_deploy.config import Config
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.report.page import percent
from mdpd_deploy.tasks.metrics import LOWER_IS_BETTER, Values, metric_text
from mdpd_deploy.train.evaluate import Outputs

SIDE = (
    "the side network, which is thrown away, is better on validation than the model that is "
    "deployed: {metric} {side} against {deployed} on {count} examples; more epochs or a larger "
    "optim.norm_lr may close the gap, and --method side keeps it, at a cost in every inference."
)
TEACHER = (
    "the side network, which teaches, ends behind the model that is deployed: {metric} {side} against "
    "{deployed} on {count} examples of validation; --method norms may do as well in less memory and "
    "time: mdpd compare --methods norms,mdpd --lr-factors 1,3,10 tells."
)
FELT = (
    "the logits distillation makes {share} of the gradient of norms and head: this run is --method "
    "norms beside a side network that is thrown away; a larger loss.logits makes it felt, or "
    "train.student_task_weight=0, as in the paper."
)
UNFELT = (
    "loss.logits={logits:g} beside train.student_task_weight={task:g}: the logits distillation will "
    "hardly be felt, and the run is --method norms beside a side network that is thrown away; "
    "a larger loss.logits changes that, or train.student_task_weight=0, as in the paper."
)
LEAST = 0.01  # the share below which a distillation is as good as none
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


def felt_caution(felt: float | None) -> list[str]:
    """Return what a user should know of a distillation whose share of the gradient was measured."""
    if felt is None or felt >= LEAST:
        return []
    return [FELT.format(share=percent(felt, 2))]


def plan_cautions(config: Config) -> list[str]:
    """Return what the weights alone say: below a thousandth of the task loss little is felt."""
    logits, task = config.loss.logits, config.train.student_task_weight
    unfelt = config.method == "mdpd" and logits < 1e-3 * task
    return [UNFELT.format(logits=logits, task=task)] if unfelt else []


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
    elif side is not None and deployed is not None and sign * side < sign * deployed:
        yield TEACHER.format(**words)
    if floor is not None and (deployed is None or sign * deployed <= sign * floor):
        yield MAJORITY.format(**words)


def _never_predicted(data: TaskData, outputs: Outputs) -> Iterator[str]:
    labels = data.evaluation["validation"].labels
    if never := data.task.unsaid(labels, outputs["output"]):
        yield f"the deployed model never answers, on validation: {never}."
