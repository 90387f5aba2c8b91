"""Random changes of training pictures: crops, mirrors, timm's policies, mixed pairs.

All of them are drawn from numbers that name the place in the run, so that loader processes and a
resumed run draw the same.
"""

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mdpd_deploy.backbones.build import explaining
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.images import open_image
from mdpd_deploy.data.preprocess import ImagePreprocess, Preprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Task

Change = Callable[[Image.Image], Image.Image]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # pictures, classes → mixed, shares [B, C]


@contextlib.contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Seed torch, numpy and Python in the block, whose own states are the same behind it."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    arrays, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed >> 1)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(python)


class Augment:
    """Random changes of training pictures, drawn from (seed, epoch, example) alone.

    A crop is torchvision's RandomResizedCrop (0.08 to 1 of the area, edges 3:4 to 4:3), the policy
    of `data.auto_augment` timm's, with what timm gives it: translations up to 0.45 of the shorter
    edge, the mean colour where nothing is, the backbone's interpolation.
    """

    def __init__(self, data: DataConfig, preprocess: ImagePreprocess) -> None:
        from torchvision.transforms import v2  # it takes a second to load, and most runs do without

        self.preprocess = preprocess
        self.frame: Change = preprocess.geometry
        if data.augment == "crop":
            low, high = data.scale or (0.08, 1.0)
            self.frame = v2.RandomResizedCrop(preprocess.size, scale=(low, high), antialias=True)
        self.changes: list[Change] = []
        if data.augment != "none":
            self.changes.append(v2.RandomHorizontalFlip())
        if data.auto_augment is not None:
            self.changes.append(policy(data.auto_augment, preprocess))

    def __call__(self, raw: Raw, key: tuple[int, int, int]) -> NDArray[np.float32]:
        assert not isinstance(raw, (str, tuple))
        image: Image.Image = open_image(raw)
        with drawn_from(*key):
            for change in (self.frame, *self.changes):
                image = change(image)
        return self.preprocess.to_array(image)


def policy(words: str, preprocess: ImagePreprocess) -> Change:
    """Return timm's policy of random changes.

    Raises:
        UserError: If timm knows none by these words.
    """
    from timm.data.transforms_factory import transforms_imagenet_train

    known = f"data.auto_augment={words!r:.60} is none of timm's policies"
    mend = "Give e.g. rand-m9-mstd0.5-inc1, augmix-m3-w3 or original-mstd0.5."
    for part in words.split("-")[1:]:  # timm passes over what has no number
        if not re.fullmatch(r"t[a-z0-9]+|[a-z]+[0-9.]+", part):
            raise UserError(f"{known}: {part!r} is no letters with a number. {mend}")
    with explaining(known, mend):
        parts: Any = transforms_imagenet_train(
            preprocess.size,
            auto_augment=words,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            separate=True,
        )
    change: Change = parts[1]  # between the crop and the tensor
    return change


def build_augment(data: DataConfig, preprocess: Preprocess) -> Augment | None:
    """Return the changes of training pictures that the options ask for."""
    if data.augment == "none" and data.auto_augment is None:
        return None
    assert isinstance(preprocess, ImagePreprocess)
    return Augment(data, preprocess)


def build_mix(data: DataConfig, task: Task) -> Mix | None:
    """Return mixup, CutMix, or for each batch one of them: torchvision's."""
    if not (data.mixup or data.cutmix):
        return None
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, data.mixup), (v2.CutMix, data.cutmix))
    mix: Mix = v2.RandomChoice(
        [kind(alpha=alpha, num_classes=task.width) for kind, alpha in kinds if alpha]
    )
    return mix
