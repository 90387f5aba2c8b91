"""Decoding every picture once before training, so that a bad one is met at the start."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import used_of
from mdpd_deploy.data.examples import Raw, Split, TaskData
from mdpd_deploy.data.images import open_image
from mdpd_deploy.data.inventory import Inventory, many_left_out
from mdpd_deploy.data.splits import subset
from mdpd_deploy.errors import UserError

Progress = Callable[[int, int], None]  # (pictures done, pictures in all)
NAMED = 5  # bad pictures named in a message


def check_images(data: TaskData, config: DataConfig, progress: Progress | None = None) -> TaskData:
    """Decode every picture of every split, and stop at bad ones or leave them out.

    Args:
        data: The task; returned unchanged if it is text.
        config: `bad_images` says whether a bad picture stops the run or is left out with a note.
        progress: Called after every picture.

    Returns:
        The task without the bad pictures, with a note per split that lost some.

    Raises:
        UserError: If `bad_images` is "stop" and a picture is bad (counts them all, names the
            first), or if leaving them out empties a split or a class.
    """
    if data.fields != ("image",):
        return data
    splits, notes = readable({"train": data.train, **data.evaluation}, config, progress)
    train = splits.pop("train")
    if data.task.labels:
        _check_classes(data, train)
    used, before = used_of(train, splits), used_of(data.train, data.evaluation)
    lost = sum(before.values()) - sum(used.values())
    inventory = data.inventory + many_left_out("pictures that cannot be read", lost)
    return replace(
        data,
        train=train,
        evaluation=splits,
        notes=(*data.notes, *notes),
        inventory=inventory + Inventory(used),
    )


def readable(
    splits: dict[str, Split], config: DataConfig, progress: Progress | None = None
) -> tuple[dict[str, Split], list[str]]:
    """Return splits of pictures without the bad ones, and a note per split that lost some.

    Raises:
        UserError: As `check_images`.
    """
    splits = dict(splits)
    total = sum(len(split) for split in splits.values())
    notes: list[str] = []
    done = 0
    for name, split in splits.items():
        problems: dict[int, str] = {}
        for index, message in enumerate(_problems(split.inputs)):
            if message is not None:
                problems[index] = message
            done += 1
            if progress is not None:
                progress(done, total)
        if not problems:
            continue
        if config.bad_images == "stop":
            raise _stop(problems, name, len(split))
        notes.append(_note(problems, name, len(split)))
        splits[name] = _without(split, problems, name)
    return splits, notes


def _problems(inputs: Sequence[Raw]) -> Iterator[str | None]:
    """Yield, picture by picture, why it cannot be read, or None."""

    def problem(index: int) -> str | None:
        try:
            picture = inputs[index]
            assert not isinstance(picture, str | tuple)
            open_image(picture)
        except UserError as err:
            return str(err)
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(problem, range(len(inputs)))


def _stop(problems: dict[int, str], name: str, count: int) -> UserError:
    first = next(iter(problems.values())).rstrip(".")
    more = "" if len(problems) == 1 else f"; {len(problems)} of the {count} in {name} are bad"
    return UserError(f"{first}{more} (--set data.bad_images=skip leaves bad pictures out).")


def _note(problems: dict[int, str], name: str, count: int) -> str:
    named = " ".join(list(problems.values())[:NAMED])
    more = f" and {len(problems) - NAMED} more." if len(problems) > NAMED else ""
    return f"{name}: {len(problems)} of {count} pictures could not be read and are left out: {named}{more}"


def _without(split: Split, problems: dict[int, str], name: str) -> Split:
    if len(problems) == len(split):
        raise UserError(
            f"none of the {len(split)} pictures in {name} could be read, "
            f"the first because {problems[0]}"
        )
    keep = np.setdiff1d(np.arange(len(split)), np.array(list(problems), dtype=np.int64))
    return subset(split, keep)


def _check_classes(data: TaskData, train: Split) -> None:
    lost = set(data.train.labels.tolist()) - set(train.labels.tolist())
    if lost:
        raise UserError(
            f"no training picture of the class {data.task.labels[int(min(lost))]!r} could be read: "
            "replace the damaged files or remove the class."
        )
