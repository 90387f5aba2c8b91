"""The logits-distillation loss, as a sum over a batch (the caller divides once).

Sums, not means: one division by the size of the whole optimiser step keeps accumulation and
several processes exact, whatever the sizes of the parts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mdpd_deploy.config import LossConfig

Errors = Callable[[Tensor, Tensor], Tensor]  # raw [B, C], labels [B] → each example's loss [B]


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    config: LossConfig,
    labels: Tensor | None = None,
    *,
    errors: Errors | None = None,
    answer: Tensor | None = None,
) -> Tensor:
    """Σ over the batch of the distance between two heads' outputs [B, C]; `teacher` is detached.

    `mse` is MDPD Eq. 3 on raw outputs (the paper mentions neither temperature nor softmax); its φ,
    where there is one (`distill.phi_logits`), has made `student` of the student's own `answer`. `kl` is the usual
    distillation loss, T² KL(teacher ‖ student), and `dkd` its two parts with weights of their own,
    1 for the label's class against the rest and `beta` among the others (Zhao et al., CVPR 2022,
    Eq. 7); both need classes (a regression refuses them), and for two the second part is 0. With
    `logits_where=better` only the examples count whose label [B] the teacher comes nearer to than
    the student's answer: a side network that lags behind does not hold the backbone back.
    """
    student, teacher = student.float(), teacher.detach().float()
    t = config.temperature
    if config.logits_form == "kl":
        distance = t * t * _divergence(student / t, teacher / t)
    elif config.logits_form == "dkd":
        assert labels is not None
        distance = t * t * _decoupled(student / t, teacher / t, labels, config.beta)
    else:
        distance = (student - teacher).square().sum(dim=-1)
    if config.logits_where == "better":
        assert labels is not None and errors is not None
        own = student if answer is None else answer
        distance = distance * (errors(teacher, labels) < errors(own.detach(), labels))
    return distance.sum()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) of each example from logits [B, C]: [B]."""
    soft = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(*soft, reduction="none", log_target=True).sum(dim=-1)


def _decoupled(student: Tensor, teacher: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return KL over {label, rest} + beta × KL among the rest, of each example: [B]."""
    label = labels.unsqueeze(-1)
    places = torch.arange(student.shape[-1] - 1, device=labels.device)
    rest = places + (places >= label)  # every class but the label: [B, C - 1]

    def split(raw: Tensor) -> tuple[Tensor, Tensor]:
        others = raw.gather(-1, rest)
        return torch.cat([raw.gather(-1, label), others.logsumexp(-1, keepdim=True)], -1), others

    (student_pair, student_others), (teacher_pair, teacher_others) = split(student), split(teacher)
    pair = _divergence(student_pair, teacher_pair)
    return pair + beta * _divergence(student_others, teacher_others)
