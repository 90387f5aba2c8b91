"""The interface of a training method, and what all of them share."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from mdpd_deploy.artifacts.run import DELTA
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.wrap import Trace
from mdpd_deploy.config import FORMER_DEFAULTS, Config, DistillConfig, PeftConfig, SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry
from mdpd_deploy.tasks import Task
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.methods.batch import Batch
from mdpd_deploy.train.precision import hold_frozen, side_autocast

NORM_OPTIONS = ("optim.norm_lr", "optim.norms_after")

Parameters = dict[str, nn.Parameter]
Parts = dict[str, Tensor]
Files = dict[str, dict[str, Tensor]]
Weights = Callable[[], Mapping[str, Tensor]]


class Method:
    """A way to fine-tune: which parameters move, and how one batch gives them gradients.

    A method owns the backbone it is given: frozen but for the norms the method declares. As it is
    here it trains a head on frozen features; each method says in what it differs.
    """

    uses_side: ClassVar[bool] = False
    deploys_added: ClassVar[bool] = False  # what is added to the backbone stays at inference
    distils: ClassVar[bool] = False  # backbone and side network teach each other
    tunes_norms: ClassVar[bool] = False  # through the norm-gradient engine
    holds_frozen: ClassVar[bool] = True  # in fewer bits, where that is asked for
    scales: ClassVar[tuple[str, ...]] = ()  # what is in the names of scales kept as columns
    peft_options: ClassVar[tuple[str, ...]] = ()  # those of the section `peft` that it reads
    backbone_group: ClassVar[str] = "norms"  # name of the group of the backbone's weights
    deployed_head: ClassVar[str] = "head"
    added_group: ClassVar[str] = "side"  # name of the group of modules beside it, and of their file
    default_lr: ClassVar[float] = 1e-3
    student_factor: ClassVar[float] = 1.0  # × lr for norms and head where they have none
    loss_names: tuple[str, ...] = ("loss", "loss_task")  # what `step` returns
    name: str

    def __init__(self, backbone: Backbone, task: Task, config: Config) -> None:
        self.backbone = backbone
        self.task = task
        self.config = config
        self.backbone_numbers = sum(weight.numel() for weight in backbone.parameters())
        backbone.requires_grad_(False)
        if self.tunes_norms and config.train.norm_grad != "none" and not backbone.norms():
            raise UserError(
                f"--method {config.method}: {backbone.source.name} has no norms to tune; use "
                "--method full, bitfit or probe."
            )
        self.modules = self.build_modules()
        hold_frozen(backbone, self.tuned().values(), self.dtype, config.train.hold)
        self.backbone_weights = self.tuned()
        for parameter in self.backbone_weights.values():
            parameter.requires_grad_(True)

    # --- what a method provides ---------------------------------------------------------------

    def build_modules(self) -> nn.ModuleDict:
        """Return the trained modules by name, `deployed_head` among them; a head alone here."""
        return nn.ModuleDict({self.deployed_head: self.new_head()})

    def tuned(self) -> Parameters:
        """Return the backbone's trained parameters by full name; none here."""
        return {}

    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what the head reads [B, D], float32; the backbone's pooled features here."""
        return self.backbone(self.cast(inputs)).float()

    def step(self, batch: Batch) -> Parts:
        """Accumulate the gradients of one batch and return its detached losses, `loss_names`.

        Losses are sums over the batch divided by `batch.count` (or `.weight`), so that adding
        up the parts of a step gives the step's mean.
        """
        return self.learn(self.head(self.deployed_head).raw(self.pooled(batch.inputs)), batch)

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return {"deployed": [B, C]} and, where there is one, {"side": [B, C]}, for users."""
        return {"deployed": self.modules[self.deployed_head](self.pooled(inputs))}

    @property
    def turns(self) -> int:
        """Return how many optimiser steps train each tensor once."""
        return 1

    def moved(self, step: int) -> dict[str, Parameters]:
        """Return what optimiser step `step` (0-based) trains, by group."""
        return self.groups

    def felt(self, batch: Batch) -> float | None:
        """Return the share of the distillation in the gradient of what is deployed, if any is."""
        return None

    def after_step(self, step: int, steps: int) -> None:  # most do nothing
        """Do what follows an optimiser step (0-based, of `steps`); gradients are still in place."""

    def may_deploy(self, step: int, steps: int) -> bool:
        """Whether the weights after `step` of `steps` steps can be the best ones."""
        return True

    def extra_state(self) -> dict[str, Tensor]:
        """Return what training must know to go on and the model does not, by name."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Put `extra_state` of an equal method back."""

    @classmethod
    def ignored_options(cls, config: Config) -> dict[str, str]:
        """Return the options that it would not read in a run, `section.option`, and with what."""
        ignored: list[str] = []
        if not cls.uses_side:
            ignored += [f"side.{name}" for name in SideConfig.model_fields]
        if not cls.distils:
            ignored += [f"distill.{name}" for name in DistillConfig.model_fields]
            ignored += ["loss.task", "loss.logits", "loss.deep", "loss.shallow"]
            ignored += ["loss.logits_form", "loss.logits_where", "loss.logits_after"]
            ignored += ["loss.temperature", "loss.beta"]
            ignored += ["train.student_task_weight", "train.late_norm_grad", "train.turns"]
        if not cls.tunes_norms:
            ignored += ["train.norm_grad", *NORM_OPTIONS]
        if not cls.holds_frozen:
            ignored += ["train.hold"]
        ignored += [f"peft.{n}" for n in PeftConfig.model_fields if n not in cls.peft_options]
        if cls.uses_side and cls.deploys_added:
            ignored += ["optim.head_lr"]
        still = NORM_OPTIONS if config.train.norm_grad == "none" else ()
        return {
            **dict.fromkeys(still, "with train.norm_grad=none"),
            **dict.fromkeys(ignored, f"with --method {config.method}"),
        }

    # --- what follows from it -----------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen backbone computes in."""
        half = self.config.train.precision == "bf16" and self.holds_frozen
        return torch.bfloat16 if half else torch.float32

    @property
    def rounded(self) -> bool:
        """Whether the backbone's frozen weights are not those it was loaded with."""
        return self.dtype != torch.float32 or self.config.train.hold is not None

    @property
    def lr(self) -> float:
        """Peak learning rate: `optim.lr`, or the method's own."""
        return self.config.optim.lr or self.default_lr

    @cached_property
    def groups(self) -> dict[str, Parameters]:
        """Trained parameters by optimiser group: side or adapter, norms or backbone, head."""
        added: Parameters = {}
        head: Parameters = {}
        for name, module in self.modules.items():
            target = head if name == "head" else added
            target.update({f"{name}.{key}": p for key, p in module.named_parameters()})
        named = {
            self.added_group: added,
            self.backbone_group: {f"backbone.{k}": p for k, p in self.backbone_weights.items()},
        }
        return {name: group for name, group in {**named, "head": head}.items() if group}

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Trained numbers by optimiser group."""
        return {name: sum(p.numel() for p in group.values()) for name, group in self.groups.items()}

    @property
    def deployed_delta(self) -> int:
        """Numbers by which the deployed model differs from the bare backbone, head included."""
        kept = {name for name in self.groups if self.deploys_added or name != self.added_group}
        return sum(count for name, count in self.parameter_counts.items() if name in kept)

    def trained_state(self) -> dict[str, Tensor]:
        """Return every tensor that training changes, and the modules' buffers, by full name."""
        state = {f"backbone.{name}": p.detach() for name, p in self.backbone_weights.items()}
        for name, module in self.modules.items():
            state.update({f"{name}.{key}": t.detach() for key, t in module.state_dict().items()})
        return state

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy values in place from `trained_state` of an equal method."""
        own = self.trained_state()
        if set(own) != set(state):
            raise KeyError(min(set(own) ^ set(state)))
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def model_files(self, original: Weights) -> Files:
        """Return what RUN/model holds of the trained tensors, by file and full name.

        Args:
            original: Gives the backbone's own weights by name, in float32.
        """
        state = self.trained_state()
        delta = {k: t for k, t in state.items() if k.startswith(("backbone.", "head."))}
        added = {k: t for k, t in state.items() if k not in delta}
        return {DELTA: delta} | ({f"{self.added_group}.safetensors": added} if added else {})

    def learn(self, raw: Tensor, batch: Batch, penalties: Parts | None = None) -> Parts:
        """Back-propagate the task loss of raw outputs: the whole step where nothing teaches.

        Args:
            raw: Outputs of a head [B, C].
            batch: Its labels.
            penalties: Further losses by name, of a whole step; a batch counts its share of them.
        """
        share = len(batch.labels) / batch.count  # the parts of a step add up to one penalty
        parts = {"loss_task": self.task.loss(raw, batch.labels) / batch.weight}
        parts |= {name: share * value for name, value in (penalties or {}).items()}
        loss = torch.stack(list(parts.values())).sum()
        loss.backward()
        return {name: value.detach() for name, value in {"loss": loss, **parts}.items()}

    def new_head(self) -> Head:
        """Return a fresh head for this task."""
        return self.task.new_head(self.backbone.width)

    def head(self, name: str) -> Head:
        """Return one of the trained heads: `head` of the backbone or `side_head`."""
        head = self.modules[name]
        assert isinstance(head, Head)
        return head

    def train_mode(self) -> None:
        """Dropout on: in the trained parts always, in the backbone as the config says."""
        self.backbone.train(self.config.backbone.dropout_active)
        self.modules.train()

    def eval_mode(self) -> None:
        self.backbone.eval()
        self.modules.eval()

    def cast(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give floating inputs the dtype in which the frozen backbone computes."""
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """Autocast around the trained float32 parts, only in bf16 runs."""
        return side_autocast(self.config.train.precision, x.device)

    def frozen_trace(self, inputs: Mapping[str, Tensor], last: int | None = None) -> Trace:
        """Run the backbone without a graph up to tap `last` (None: L)."""
        with torch.no_grad():
            return self.backbone.trace(inputs, last=last)


METHODS: Registry[type[Method]] = Registry("method (--method)")


def check_options(method: type[Method], config: Config) -> None:
    """Refuse an option that the method would ignore."""
    plain = Config()
    for option, where in method.ignored_options(config).items():
        section, name = option.split(".")
        value = getattr(getattr(config, section), name)
        usual = getattr(getattr(plain, section), name), FORMER_DEFAULTS.get(option)
        if value not in usual:
            raise UserError(f"{option}={value} does nothing {where}: leave it out.")


def build_method(backbone: Backbone, task: Task, config: Config) -> Method:
    """Build the method that `config.method` names around a backbone."""
    kind = METHODS.get_or_raise(config.method)
    check_options(kind, config)
    method = kind(backbone, task, config)
    method.name = config.method
    return method
