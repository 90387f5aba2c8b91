"""AdamW groups, their rates and clipping.

Groups with their own learning rate and their own clip norm: `side` or `adapter`, `norms` or
`backbone`, `head`. Norms, biases and what a method names as scales get no weight decay. Tensors
that only the logits loss reaches (MDPD without a student task loss) see gradients scaled by 1e-4,
which Adam undoes only down to its eps: they take 1e-12.
"""

import math

import torch
from torch import Tensor, nn

from mdpd_deploy.config import Config
from mdpd_deploy.train.methods import Method
from mdpd_deploy.train.methods.base import Parameters


def build_optimizer(method: Method) -> torch.optim.AdamW:
    """Build AdamW over the method's groups; each group carries its `name` and `peak_lr`."""
    config = method.config
    optim = config.optim
    student = method.lr * method.student_factor
    peak = {
        "side": method.lr,
        "adapter": method.lr,
        "backbone": method.lr,
        "norms": optim.norm_lr or student,
        "head": optim.head_lr or student,
    }
    groups = []
    for name in method.groups:
        decayed, plain = _by_decay(method, name)
        for decay, tensors in ((optim.weight_decay, decayed), (0.0, plain)):
            if tensors:
                groups.append(
                    {
                        "params": list(tensors.values()),
                        "names": list(tensors),
                        "group": name,
                        "lr": peak[name],
                        "peak_lr": peak[name],
                        "weight_decay": decay,
                        "eps": 1e-12 if _logits_only(config, name) else 1e-8,
                    }
                )
    # fused: one kernel for many tensors, and nothing on the way
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), fused=True)


def _by_decay(method: Method, group: str) -> tuple[Parameters, Parameters]:
    parameters = method.groups[group]

    def scales(name: str, p: nn.Parameter) -> bool:
        return group == "norms" or p.dim() < 2 or any(part in name for part in method.scales)

    plain = {k: p for k, p in parameters.items() if scales(k, p)}
    return {k: p for k, p in parameters.items() if k not in plain}, plain


def _logits_only(config: Config, group: str) -> bool:
    return config.method == "mdpd" and group != "side" and config.train.student_task_weight == 0


def set_learning_rate(
    optimizer: torch.optim.Optimizer, share: float, *, norms_still: bool = False
) -> None:
    """Set every group's rate to a share of its own peak.

    Args:
        optimizer: From `build_optimizer`.
        share: From `Rate.share`.
        norms_still: Keep the norms as they are: a head that knows nothing yet would bend the
            features to its random weights (linear probing, then tuning: Kumar et al., ICLR 2022).
    """
    for group in optimizer.param_groups:
        still = norms_still and group["group"] == "norms"
        group["lr"] = 0.0 if still else group["peak_lr"] * share


def clip_gradients(method: Method, limit: float | None, step: int = 0) -> dict[str, Tensor]:
    """Clip the gradient norm of each group that a step trains; return the norms before clipping."""
    norms = {}
    for name, parameters in method.moved(step).items():
        norms[name] = nn.utils.clip_grad_norm_(parameters.values(), limit or math.inf)
    return norms


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors: `<parameter>/<slot>`."""
    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                found[f"{name}/{slot}"] = value
    return found


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put a state from `optimizer_tensors` back, in place of whatever is there."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            slots = {
                key.rpartition("/")[2]: value.to(parameter.device, copy=True)
                for key, value in tensors.items()
                if key.rpartition("/")[0] == name
            }
            if slots:
                optimizer.state[parameter] = slots
