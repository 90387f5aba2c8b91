"""What a user should know of the examples before a score of theirs is believed, as sentences."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mdpd_deploy.data.examples import Raw, Split, TaskData

FEW = 100  # examples of a split on which a score is rough: ±10 points of accuracy, at 95 %


def data_cautions(data: TaskData) -> list[str]:
    """Return a sentence for everything in the examples that makes training or scores doubtful."""
    labels = data.train.labels, data.evaluation["validation"].labels
    return [*data.task.cautions(*labels), *_few(data), *_shared(data)]


def _few(data: TaskData) -> Iterator[str]:
    count = len(data.evaluation["validation"])
    if count < FEW:
        off = f"; chance alone moves accuracy by about ±{98 / math.sqrt(count):.0f} points"
        yield (
            f"validation has {count} example{'s' if count > 1 else ''} only, so its score is rough"
            f"{off if data.task.labels else ''}."
        )


def _shared(data: TaskData) -> Iterator[str]:
    how = "word for word" if data.fields[0] == "text" else "byte for byte"
    for name, split in data.evaluation.items():
        if shared := count_shared(data.train, split):
            yield (
                f"{shared:,} of {len(split):,} {name} examples are in train too, {how}: a score on "
                "them says little of new data; remove them from one of the two."
            )


def count_shared(train: Split, other: Split) -> int:
    """Count the examples of `other` whose input is in `train` too, whatever their labels.

    Texts and pictures in memory are compared whole, picture files by their bytes. Pictures that
    only a data set knows how to decode are not compared.
    """
    if any(not isinstance(split.inputs, list | tuple) for split in (train, other)):
        return 0
    if isinstance(train.inputs[0], Path):
        return _shared_files(train, other)
    known = {_content(raw) for raw in train.inputs}
    return sum(_content(raw) in known for raw in other.inputs)


def _shared_files(train: Split, other: Split) -> int:
    """Compare files; only those whose size is found in both splits are read."""
    sizes = [[_size(raw) for raw in split.inputs] for split in (train, other)]
    both = set(sizes[0]) & set(sizes[1]) - {None}
    digests = [
        [_digest(raw) for raw, size in zip(split.inputs, found, strict=True) if size in both]
        for split, found in zip((train, other), sizes, strict=True)
    ]
    known = set(digests[0])
    return sum(digest in known for digest in digests[1])


def _size(raw: Raw) -> int | None:
    return raw.stat().st_size if isinstance(raw, Path) and raw.is_file() else None


def _digest(raw: Raw) -> bytes:
    assert isinstance(raw, Path)
    with raw.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _content(raw: Raw) -> object:
    if isinstance(raw, Image.Image):
        return raw.mode, raw.size, hashlib.sha256(raw.tobytes()).digest()
    return raw
