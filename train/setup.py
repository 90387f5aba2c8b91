"""From a config to everything a run needs: data, backbone, method, optimiser, plan."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mdpd_deploy.backbones import Backbone, Card, card_of, check_backbone, load_backbone
from mdpd_deploy.config import Config, DataConfig
from mdpd_deploy.config.recipes import recipe_notes
from mdpd_deploy.data.cautions import data_cautions
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.data.lengths import TextLengths, lengths_note, text_lengths
from mdpd_deploy.data.load import default_resize, load_task
from mdpd_deploy.data.preprocess import ImagePreprocess, TextPreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.augment import build_augment
from mdpd_deploy.train.batches import Schedule
from mdpd_deploy.train.log import check_trackers
from mdpd_deploy.train.memory.choice import SettledMemory, free_bytes, settle_memory
from mdpd_deploy.train.methods import Method, build_method
from mdpd_deploy.train.rate import Rate, build_rate

CHANGES = ("augment", "scale", "auto_augment", "mixup", "cutmix")  # of training pictures
READ_OF = {  # options of `data` that only one kind of input reads
    "image": (*CHANGES, "resize", "crop_pct", "normalize"),
    "text": ("max_length", "pad"),
}


@dataclass(frozen=True)
class Setup:
    """What the loop works on."""

    config: Config
    data: TaskData
    task: Task
    backbone: Backbone
    method: Method
    schedule: Schedule
    steps: int
    rate: Rate
    state: PartialState
    original: dict[str, Tensor] | None  # a backbone that cannot be loaded again
    lengths: dict[str, TextLengths]  # tokens of the texts by split; empty for images
    text_length: int | None  # tokens of a batch with the longest of them
    memory: SettledMemory  # what a step needs

    @property
    def device(self) -> torch.device:
        assert self.state.device is not None
        return self.state.device

    @property
    def examples(self) -> dict[str, int]:
        """How many each split holds."""
        splits = {"train": self.data.train, **self.data.evaluation}
        return {name: len(split) for name, split in splits.items()}

    @property
    def eval_every(self) -> int:
        return self.config.train.eval_every or min(self.steps, self.schedule.steps_per_epoch)

    @property
    def checkpoint_every(self) -> int:
        return self.config.checkpoint.every or self.eval_every

    @property
    def card(self) -> Card:
        """What the user is told of the backbone."""
        return card_of(self.backbone, self.config.backbone)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences a user should see: of the data, and of a backbone that is not for own data."""
        advice = None if self.config.task == "digits" else self.card.advice
        return (*recipe_notes(self.config), *self.data.notes, *([advice] if advice else []))

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the backbone's weights as they were before training, float32, by name."""
        if self.original is not None:
            return self.original
        data = self.config.data
        plain = load_backbone(self.config.backbone, max_length=data.max_length, pad=data.pad)
        return plain.state_dict()


def prepare(config: Config) -> Setup:
    """Read the data, load the backbone and build the method, all from the seed.

    The config of what is returned is settled: no `train.norm_grad` or `train.batch` is `auto`.

    Raises:
        UserError: For anything the user gave that cannot work.
    """
    check_trackers(config.track.to)
    check_backbone(config.backbone)
    state = process_state(config.train.device)
    data = load_task(config.task, config.data, seed=config.train.seed)
    if "image" in data.fields:
        data = check_images(data, config.data)
    task = data.task.fitted(data.train.labels, config.task, config)
    backbone = load_backbone(
        config.backbone, max_length=config.data.max_length, pad=config.data.pad
    )
    check_modality(backbone, data, config)
    if isinstance(backbone.preprocess, ImagePreprocess):
        backbone.preprocess = backbone.preprocess.asked(config.data)
        build_augment(config.data, backbone.preprocess)  # refuses what timm does not know
    lengths = measure_lengths(backbone, data)
    told = [lengths_note(lengths)] if lengths else []
    text_length = batch_length(config, lengths)
    memory = settle_memory(
        config,
        data.task,
        text_length=text_length,
        # the same in every process of a launch
        free=broadcast_object_list([free_bytes(config.train.device, state.num_processes)])[0],
    )
    config = memory.config
    told += [memory.choice.words] if memory.choice else []
    data = replace(data, notes=(*data.notes, *told, *data_cautions(data)))
    original = None
    if not config.backbone.pretrained:
        original = {name: t.detach().clone() for name, t in backbone.state_dict().items()}
    torch.manual_seed(config.train.seed)
    method = build_method(backbone, task, config)
    backbone.to(state.device)
    method.modules.to(state.device)
    schedule = Schedule(
        len(data.train),
        config.train.batch_size,
        config.train.accumulate,
        config.train.seed,
        state.num_processes,
    )
    steps = total_steps(config, schedule)
    rate = build_rate(method.lr, steps, schedule.steps_per_epoch, config.optim)
    return Setup(
        config,
        data,
        task,
        backbone,
        method,
        schedule,
        steps,
        rate,
        state,
        original,
        lengths,
        text_length,
        memory,
    )


def measure_lengths(backbone: Backbone, data: TaskData) -> dict[str, TextLengths]:
    """Count tokens split by split; nothing for images."""
    preprocess = backbone.preprocess
    if not isinstance(preprocess, TextPreprocess):
        return {}
    splits = {"train": data.train, **data.evaluation}
    return {name: text_lengths(split, preprocess) for name, split in splits.items()}


def batch_length(config: Config, lengths: dict[str, TextLengths]) -> int | None:
    """Return the tokens of a batch with the longest training text, padded; None for images."""
    if not lengths:
        return None
    most = config.data.max_length
    return most if config.data.pad == "max" else min(most, lengths["train"].longest)


def total_steps(config: Config, schedule: Schedule) -> int:
    """Return the optimiser steps of a run; 10 epochs when neither steps nor epochs are given."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, round((config.train.epochs or 10) * schedule.steps_per_epoch))


def process_state(device: str) -> PartialState:
    """Join the processes of a launch, on the device that was asked for."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            "--device cuda: no CUDA device is available here; use --device cpu, or check the "
            "driver with `mdpd doctor`."
        )
    return PartialState(cpu=device == "cpu" or not available)


def check_modality(backbone: Backbone, data: TaskData, config: Config) -> None:
    """Refuse a vision backbone for text and the reverse, and the other's options."""
    takes = backbone.takes
    wanted = data.fields[0]
    if takes != wanted:
        example = "hf:bert-base-uncased" if wanted == "text" else "timm:vit_base_patch16_224"
        raise UserError(
            f"--task {config.task} works on {wanted}s, but --backbone {config.backbone.name} "
            f"takes {takes}s: name one for {wanted}s, e.g. --backbone {example} or a local "
            "folder."
        )
    other = "image" if takes == "text" else "text"
    plain = DataConfig()
    for name in READ_OF[other]:
        if getattr(config.data, name) != getattr(plain, name):
            raise UserError(f"data.{name} is for {other}s: leave it out for {takes}s.")
    check_mixing(data.task, config)


def check_mixing(task: Task, config: Config) -> None:
    """Refuse mixed pictures where labels cannot be mixed."""
    for name in ("mixup", "cutmix"):
        if getattr(config.data, name) and not task.mixes:
            raise UserError(
                f"data.{name} mixes the labels of two pictures, and those of task {config.task} "
                "are no shares of classes: leave it out."
            )
        if getattr(config.data, name) and config.loss.logits_form == "dkd":
            raise UserError(
                f"data.{name} leaves no picture one class to part from the others, as "
                "loss.logits_form=dkd does: leave one out."
            )


def with_resize(config: Config) -> Config:
    """Settle `data.resize` of a new run, so that its config says what was used.

    A config without it is that of an older run and means the backbone's own way, a crop.
    """
    if config.data.resize is not None or default_resize(config.task) is None:
        return config
    data = config.data.model_copy(update={"resize": default_resize(config.task)})
    return config.model_copy(update={"data": data})


def default_out(config: Config, now: str) -> Path:
    """Return runs/DATE-TASK-METHOD."""
    method = (
        config.method
        if config.method not in ("mdpd", "side")
        else (f"{config.method}-{config.side.name}")
    )
    return Path("runs") / f"{now}-{config.task.replace('/', '-')}-{method}"
