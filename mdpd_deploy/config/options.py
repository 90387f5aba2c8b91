"""Every option of a run, once: typed, documented, unknown keys refused."""

import hashlib
import re
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

from mdpd_deploy.text import is_encoding

SIDE_ALIASES = {"dtl": "dtlv1"}
BUILTIN_BACKBONE = "builtin:vit-xs-tin32"


class Section(BaseModel):
    """A frozen group of options that refuses unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _whole_number_as_text(value: object) -> object:
    """Let `[0,1]` name the classes 0 and 1."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def younger(default: Any) -> Any:
    """Return an option that the first runs did not have: it is written only where it is set.

    So the checkpoints and bundles of older runs still know their config.
    """
    return Field(default=default, exclude_if=lambda value: bool(value == default))


YOUNGER = younger(None)

# What the configs of earlier runs say where nobody chose.
FORMER_DEFAULTS = {"loss.logits": 1e-4, "loss.logits_form": "mse", "loss.logits_where": "all"}

Share = Annotated[float, Field(gt=0, le=1)]


class DataConfig(Section):
    """Which examples, and how they become tensors."""

    path: str | None = None  # --data: a file, a folder, or a hub data set `hub:NAME`
    eval_path: str | None = None  # --eval-data: a separate evaluation file or folder
    text: list[str] | None = None  # --text A[,B]: one or two text columns
    image: str | None = None  # --image: the column of image paths
    label: str | None = None  # --label: the label column
    encoding: str | None = YOUNGER  # of tables that are text, e.g. latin-1; default: UTF-8
    # class names in order; default: sorted names of the train split
    labels: list[Annotated[str, BeforeValidator(_whole_number_as_text)]] | None = None
    max_length: int = Field(default=128, ge=4)  # tokens kept of a text
    pad: Literal["longest", "max"] = "longest"  # pad a batch to its longest text, or to max_length
    # training images: mirror; random crop + mirror
    augment: Literal["none", "flip", "crop"] = "none"
    # share of a picture's area that a random crop keeps, from least to most; default: 0.08 to 1
    scale: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = YOUNGER
    # timm's policies, e.g. rand-m9-mstd0.5-inc1, augmix-m3-w3 or original-mstd0.5
    auto_augment: str | None = YOUNGER
    # alphas of mixup and CutMix: pairs of a batch are blended, or one gets a box of the other
    mixup: Annotated[float, Field(ge=0)] | None = YOUNGER
    cutmix: Annotated[float, Field(ge=0)] | None = YOUNGER
    # a picture's way to the model's size: all of it squashed, its middle cropped, or all of it with
    # a border; default: squash for vtab/ and vtab-full/, else crop
    resize: Literal["squash", "crop", "pad"] | None = YOUNGER
    # edge of what is kept / edge of the resized picture; default: the backbone's own for crop, else 1
    crop_pct: Share | None = YOUNGER
    # mean and deviation of the channels: the backbone's own (default), 0.5 and 0.5, or ImageNet's
    normalize: Literal["model", "half", "imagenet"] | None = YOUNGER
    # an unreadable training image ends the run, or not
    bad_images: Literal["stop", "skip"] = "stop"
    # split off when there is no validation data
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    # seed of what is split off and of `limit`; default: train.seed, in a comparison the first one
    split_seed: int | None = Field(default=None, ge=0, lt=2**32)
    # glue/: validation and test as LST's code makes them of GLUE's labelled files; default: official
    splits: Literal["lst"] | None = YOUNGER
    # use only the first N training examples (after a shuffle)
    limit: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)  # loader processes

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str | None) -> str | None:
        if name is not None and not is_encoding(name):
            raise ValueError("Python knows no encoding of texts by this name, as utf-8 or latin-1")
        return name

    @model_validator(mode="after")
    def _scale_is_a_crops(self) -> Self:
        if self.scale is not None and self.augment != "crop":
            raise ValueError(
                "data.scale is of random crops: set data.augment=crop, or leave it out"
            )
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError("data.scale goes from the least share to the most, e.g. [0.08,1]")
        return self


class BackboneConfig(Section):
    """The frozen network that is deployed."""

    name: str = BUILTIN_BACKBONE  # builtin:NAME, timm:NAME, hf:NAME[@revision], or a local folder
    weights: str | None = None  # --weights: a local file for timm:NAME
    pretrained: bool = True  # false: random weights, stored with the run
    pooling: Literal["mean", "cls"] = "mean"  # mean of real tokens / patch tokens, or the first
    tower: Literal["vision", "text"] | None = None  # of an image-text model; vision if not named
    img_size: int | None = Field(default=None, ge=1)  # pixels, vision only
    patch_size: int | None = Field(default=None, ge=1)  # pixels, vision only
    dropout_active: bool = True  # keep the backbone's own dropout while training
    # stochastic depth: the rate at which the last block is left out; earlier ones less (timm's way)
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = YOUNGER

    @model_validator(mode="after")
    def _drop_path_is_active(self) -> Self:
        if self.drop_path and not self.dropout_active:
            raise ValueError(
                "backbone.drop_path does nothing with backbone.dropout_active=false: leave one out"
            )
        return self


class SideConfig(Section):
    """The side network that teaches and then fades."""

    name: str = "unipt"
    # r: side width = width / r; default 8 text, 2 vision
    reduction: int | None = Field(default=None, ge=1)
    variant: Literal["reference", "paper"] = "reference"  # released code, or the paper's equations
    projection: Literal["auto", "d-d", "d-D-d"] = "auto"  # UniPT's map of the blend
    late_layers: int = Field(default=1, ge=1)  # SHERL: blocks that it enters anew
    # SHERL: what its gates let through of a late block's own input at the start; default: open beside
    # plain transformers that end in a norm, else closed as released
    gate: Literal["closed", "open"] | Annotated[float, Field(gt=-1, lt=1)] | None = YOUNGER
    rank: int = Field(default=2, ge=1)  # DTL: d', the rank of each reading
    kernel: int | None = Field(default=None, ge=1, le=15)  # DTL: k; default 5 images, 3 text
    dtl_first: int | None = Field(default=None, ge=1)  # DTL: M, first adapted block; L//2 + 1
    dtl_reads: list[int] | None = Field(default=None, min_length=1)  # DTLv2: blocks that are read
    dtl_adds: list[int] | None = Field(default=None, min_length=1)  # DTLv2: blocks adapted
    # DTL: final norm, then mean of the tokens, as the deployed model; or released: mean, then norm
    readout: Literal["model", "released"] = younger("model")
    # LST's first weights: the backbone's largest, its most important for the task, or random
    init: Literal["magnitude", "fisher", "random"] = "magnitude"

    @field_validator("name")
    @classmethod
    def _alias(cls, name: str) -> str:
        return SIDE_ALIASES.get(name, name)


class PeftConfig(Section):
    """The rivals of the library peft: LoRA, AdaLoRA, prompt and prefix tuning."""

    # LoRA: r of every update; AdaLoRA: the mean r that is kept, of 1.5 times as many at first
    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)  # updates are scaled by alpha / their first rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what LoRA and AdaLoRA read
    # updated maps: query and value (a fused map whole), or every linear layer of the blocks
    targets: Literal["attention", "all"] = "attention"
    tokens: int = Field(default=20, ge=1)  # virtual tokens of prompt and prefix tuning


class DistillConfig(Section):
    """MDPD's own parts: bottlenecks φ, mask, generation blocks G (paper Eq. 1-7)."""

    mask_ratio: float = Field(default=0.5, ge=0, le=1)  # λ, Eq. 5
    mask_level: Literal["sample", "batch"] = "sample"  # one mask per example, or per batch
    mask_tokens: Literal["patches", "all"] = younger(
        "patches"
    )  # all: class and register tokens too
    # d; default min(12, side width // 2), and side width // 4 with gen_conv=full
    bottleneck: int | None = Field(default=None, ge=1)
    # the two convolutions of G: depth-wise behind the bottleneck, or full ones inside it
    gen_conv: Literal["depthwise", "full"] = younger("depthwise")
    share_phi: bool = False  # one φ for all layers instead of one each
    share_gen: bool = False  # one G for all deep layers instead of one each
    shallow_layers: int | None = Field(default=None, ge=0)  # default: the first half (rounded up)
    last_layer: bool = younger(False)  # SHERL: the late block's output is a side feature too
    feature_mean: bool = False  # mean over tokens and channels instead of the paper's sum
    side_head: Literal["final", "paper"] = "final"  # Y_S from the final norm, or Eq. 3 on s_L
    phi_logits: bool = younger(False)  # Eq. 3 compares a learned linear map of Y_B
    # which backbone the side network reads: the one whose norms are being tuned, or, for one more
    # forward a step, the one that training began with: a teacher whose pupil cannot move it
    teacher: Literal["tuned", "untouched"] = younger("tuned")


class LossConfig(Section):
    """Weights of the losses (MDPD supplementary B) and the form of the logits loss."""

    task: float = Field(default=1.0, ge=0)
    logits: float = Field(default=1.0, ge=0)  # the paper has 1e-4, which is hardly felt
    deep: float | None = Field(default=None, ge=0)  # default 6e-5, and 0 over DTL
    shallow: float | None = Field(default=None, ge=0)  # default 4e-5, and 0 over DTL
    # mse: Eq. 3; kl: KL divergence at `temperature`; dkd: the same decoupled, with `beta` on the other
    # classes. Default: kl, and mse where the answers are numbers
    logits_form: Literal["mse", "kl", "dkd"] | None = None
    temperature: float = Field(default=2.0, gt=0)  # used by kl and dkd
    beta: float = Field(default=8.0, ge=0)  # used by dkd
    # which examples the logits loss counts: all, or those that the side network answers better
    logits_where: Literal["all", "better"] = "better"
    # share of the steps before the logits loss counts: the side network learns first
    logits_after: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # of the classification loss

    @model_validator(mode="after")
    def _form_reads_what_is_set(self) -> Self:
        for name in ("logits_form", "logits_where", "logits_after"):
            usual = type(self).model_fields[name].default, FORMER_DEFAULTS.get(f"loss.{name}")
            if self.logits == 0 and getattr(self, name) not in usual:
                raise ValueError(f"loss.{name} is not read with loss.logits=0: leave it out")
        for name, forms in (("temperature", ("kl", "dkd")), ("beta", ("dkd",))):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.logits_form not in (None, *forms):
                raise ValueError(
                    f"loss.{name} is not read by loss.logits_form={self.logits_form}: leave it "
                    f"out, or set loss.logits_form={forms[-1]}"
                )
        return self


NORM_GRADIENTS = ("recompute", "recompute-halves", "full", "auto", "local", "none")


def _size_with_unit(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*[kKMGT]i?B", value):
        return value
    raise ValueError("a size is a number with its unit, e.g. 4GB or 500MiB")


def _batch(value: object) -> object:
    text = str(value)
    if not isinstance(value, bool) and re.fullmatch(r"(auto:)?[1-9][0-9]*|auto", text):
        return text if text.startswith("auto") else int(text)
    raise ValueError(
        "a batch is a whole number of examples from 1 on, auto, or auto:N for N examples a step"
    )


class TrainConfig(Section):
    """Length, batches, precision and how the norms get their gradient."""

    epochs: float | None = Field(default=None, gt=0)  # passes over the training data; default 10
    steps: int | None = Field(default=None, ge=1)  # optimiser steps; overrides epochs
    # examples per optimiser step and process, before accumulation; auto:N takes as many at a time as
    # fit, and accumulates them to N (auto: 32)
    batch: Annotated[int | str, BeforeValidator(_batch)] = 32
    accumulate: int = Field(default=1, ge=1)  # batches per optimiser step
    eval_batch: int = Field(default=64, ge=1)
    eval_every: int | None = Field(default=None, ge=1)  # steps; default: once per epoch
    # stop after this many evaluations without a gain
    patience: int | None = Field(default=None, ge=1)
    keep: Literal["best", "last"] = "best"  # which weights become RUN/model
    # decay of an exponential mean over the steps of all that is trained, e.g. 0.999: it is what is
    # evaluated and becomes RUN/model
    ema: Annotated[float, Field(gt=0, lt=1)] | None = YOUNGER
    # recompute | recompute-halves | full | auto (the fastest exact one that fits) | late:K | local |
    # none
    norm_grad: str = "recompute"
    # what a step may need, e.g. 4GB; a run that needs more is refused. auto without it: the card's free
    # memory, or four fifths of the machine's
    memory: Annotated[str, BeforeValidator(_size_with_unit)] | None = YOUNGER
    # let the side pass also move norms it runs through (literal joint)
    late_norm_grad: bool = False
    # both passes in every step, or in turn: odd steps train the side network, even ones the backbone
    turns: Literal["joint", "alternate"] = younger("joint")
    # task loss on the backbone's own head; the paper has none, and at 1 its logits loss is hardly felt
    student_task_weight: float = Field(default=1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: frozen weights held, side autocast, in bf16
    # what the frozen matrices lie in between their uses, where that is less than `precision`
    hold: Literal["bf16", "int8", "nf4"] | None = YOUNGER
    class_weights: Literal["none", "balanced"] | list[Annotated[float, Field(ge=0)]] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _norm_grad_is_known(self) -> Self:
        mode, _, blocks = self.norm_grad.partition(":")
        late = mode == "late" and blocks.isdigit() and int(blocks) >= 1
        if not (late or self.norm_grad in NORM_GRADIENTS):
            raise ValueError(
                f"train.norm_grad={self.norm_grad!r} is not one of "
                f"{', '.join(NORM_GRADIENTS)}, late:K (K a number of blocks)"
            )
        return self

    @model_validator(mode="after")
    def _hold_is_less(self) -> Self:
        if self.hold == self.precision:
            raise ValueError("train.hold=bf16 is what train.precision=bf16 does: leave one out")
        return self

    @model_validator(mode="after")
    def _auto_accumulates_itself(self) -> Self:
        if self.auto_batch and self.accumulate != 1:
            raise ValueError(
                f"train.batch={self.batch} settles train.accumulate itself: leave that out, and say "
                "in train.batch=auto:N how many examples a step has"
            )
        return self

    @property
    def auto_batch(self) -> bool:
        """Whether `batch` and `accumulate` are still to be settled."""
        return isinstance(self.batch, str)

    @property
    def batch_size(self) -> int:
        """`batch` of a run in which it is settled."""
        assert isinstance(self.batch, int), "settle_memory comes first"
        return self.batch

    @property
    def step_size(self) -> int:
        """Examples per optimiser step and process."""
        if isinstance(self.batch, int):
            return self.batch * self.accumulate
        return int(self.batch.partition(":")[2] or 32)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return TypeAdapter(ByteSize | None).validate_python(self.memory)


class OptimConfig(Section):
    """AdamW and its schedule."""

    # side network, φ, G, side head, adapters; default: the method's own (mdpd and side 1e-3, norms
    # and probe 1e-2, full 5e-5, the rest as their papers have it: train/methods)
    lr: float | None = Field(default=None, gt=0)
    # tuned norms; default: lr, and 10 lr beside a side network that teaches (--method mdpd)
    norm_lr: float | None = Field(default=None, gt=0)
    head_lr: float | None = Field(default=None, gt=0)  # deployed head; default: as norm_lr's
    weight_decay: float = Field(default=0.01, ge=0)  # not on norms and biases
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of the steps
    warmup_steps: Annotated[int, Field(ge=0)] | None = YOUNGER  # in place of `warmup`
    warmup_epochs: Annotated[float, Field(ge=0)] | None = YOUNGER  # in place of `warmup`
    # where the warm-up starts; default: at its first step's share of lr, so that its last has lr.
    # This and min_lr are for the group of `lr`: those with rates of their own keep their ratio to it
    warmup_lr: Annotated[float, Field(ge=0)] | None = YOUNGER
    # whether the decay begins after the warm-up (default) or at step 0, under it (DTL, timm)
    warmup_prefix: bool | None = YOUNGER
    min_lr: Annotated[float, Field(ge=0)] | None = YOUNGER  # where the decay ends; default 0
    cooldown_epochs: Annotated[float, Field(gt=0)] | None = YOUNGER  # of the run, its end at min_lr
    per_epoch: bool | None = YOUNGER  # the rate stays within an epoch, and steps between them
    # share of the steps before the norms move: the head learns first on the features as they are
    norms_after: float = Field(default=0.0, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float | None = Field(default=1.0, gt=0)  # gradient norm, per group

    @model_validator(mode="after")
    def _schedule_reads_what_is_set(self) -> Self:
        lengths = [n for n in ("warmup", "warmup_steps", "warmup_epochs") if self._is_set(n)]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} each say how long the warm-up is: give one")
        unread: dict[str, tuple[str, ...]] = {}
        if not (self.warmup_steps or self.warmup_epochs) and (
            self.warmup == 0 or set(lengths) - {"warmup"}
        ):
            unread["without a warm-up"] = ("warmup_lr", "warmup_prefix")
        if self.schedule == "constant":
            tail = ("min_lr",) if self.cooldown_epochs is None else ()
            unread["with optim.schedule=constant"] = ("warmup_prefix", *tail)
        for where, names in unread.items():
            for name in filter(self._is_set, names):
                raise ValueError(f"optim.{name} is not read {where}: leave it out")
        if self.cooldown_epochs and not self.min_lr:
            raise ValueError("optim.cooldown_epochs needs optim.min_lr: at 0 nothing is learnt")
        return self

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class CheckpointConfig(Section):
    """How often a run can be resumed from."""

    every: int | None = Field(default=None, ge=1)  # steps; default: at every evaluation


class TrackConfig(Section):
    """Trackers beside the run's own files (extra `track`)."""

    to: list[Literal["tensorboard", "trackio"]] = []


class Config(Section):
    """One run."""

    # --recipe: the paper's protocol that filled in what was not given; what it set stands below
    recipe: str | None = YOUNGER
    task: str = "digits"
    method: str = "mdpd"
    out: str | None = None
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    side: SideConfig = SideConfig()
    distill: DistillConfig = DistillConfig()
    peft: PeftConfig = PeftConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _held_weights_take_no_gradient(self) -> Self:
        if self.side.init == "fisher" and self.train.hold:
            raise ValueError(
                "side.init=fisher looks at the gradient of every weight, and those of train.hold="
                f"{self.train.hold} have none: leave one out"
            )
        return self

    def to_yaml(self) -> str:
        """Return the config as YAML that `load_config` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Return every option by its dotted name, in the types that YAML has."""
        found: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            inner = value.items() if isinstance(value, dict) else ()
            found |= {f"{name}.{key}": item for key, item in inner} or {name: value}
        return found

    def sha256(self) -> str:
        """Return the hash of `to_yaml`, by which a bundle knows its run."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()
