"""Hugging Face data sets by name: `hub:NAME[:CONFIG][@REVISION]`, or `hub:` and a local folder.

Whatever `datasets.load_dataset` reads without running foreign code. Pictures stay encoded until
they are asked for and pass our own limits (`images.decode_image`).
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mdpd_deploy.data.cells import Where, label_cells, text_cells
from mdpd_deploy.data.examples import Lazy, Raw, joined
from mdpd_deploy.data.images import FILE_FORMATS, decode_image, open_image
from mdpd_deploy.data.inventory import Inventory, many_left_out
from mdpd_deploy.data.rows import Columns, Rows
from mdpd_deploy.data.splits import SPLIT_NAMES
from mdpd_deploy.errors import UserError
from mdpd_deploy.hub import hub_reachable, quiet

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PREFIX = "hub:"
SPLITS_FILE = "dataset_dict.json"  # in a folder of `save_to_disk` that holds several splits


def read_hub(
    spec: str, loaded: "DatasetDict", columns: Columns
) -> tuple[dict[str, Rows], Inventory]:
    """Pick the columns of a loaded data set.

    Args:
        spec: The name as typed, for messages.
        loaded: What `load_hub` returned.
        columns: Of its inputs, and of the label; a ClassLabel gives its names.

    Returns:
        Rows of the splits called train, validation and test (or another of their usual names), and
        the account of the splits called otherwise.

    Raises:
        UserError: If the data set has none of these splits, or lacks a column.
    """
    splits: dict[str, Rows] = {}
    others = Inventory()
    for name, dataset in loaded.items():
        split = SPLIT_NAMES.get(str(name).lower())
        if split is not None and split not in splits:
            splits[split] = _rows(dataset, f"{spec} {name}", columns)
        else:
            others += many_left_out("rows of other splits", len(dataset), str(name))
    if not splits:
        raise UserError(
            f"{spec} has no train, validation or test split, it has: {', '.join(map(str, loaded))}."
        )
    return splits, others


def load_hub(spec: str) -> "DatasetDict":
    """Load `hub:NAME[:CONFIG][@REVISION]`, or `hub:FOLDER` in any form that `datasets` reads.

    Raises:
        UserError: If that fails, for whatever reason.
    """
    import datasets

    name, config, revision = _parse(spec)
    with quiet("datasets", "huggingface_hub"), _no_tries_in_vain():
        return _load(datasets, name, config, revision)


def is_saved(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` made a folder, of one split or of several."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / SPLITS_FILE).is_file()


def load_saved(folder: Path) -> "DatasetDict":
    """Load a folder of `datasets.save_to_disk`; one without splits is `train`.

    Raises:
        UserError: If it is damaged.
    """
    import datasets

    try:
        with quiet("datasets"):
            loaded = datasets.load_from_disk(str(folder))
    except Exception as err:  # a damaged one raises whatever was stumbled on
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise UserError(
            f"{folder} is no sound saved data set ({reason:.200}): save it again."
        ) from err
    if isinstance(loaded, datasets.DatasetDict):
        return loaded
    return datasets.DatasetDict({"train": loaded})


def _load(datasets: Any, name: str, config: str | None, revision: str | None) -> "DatasetDict":
    try:
        if is_saved(Path(name)):
            return load_saved(Path(name))
        loaded = datasets.load_dataset(name, config, revision=revision)
    except UserError:
        raise
    except Exception as err:  # datasets, the hub client and the network raise dozens of kinds
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise UserError(
            f"the hub data set {name!r} could not be loaded ({reason}): check the name and the "
            "network, or download it and give the local files."
        ) from err
    return cast("DatasetDict", loaded)


@contextlib.contextmanager
def _no_tries_in_vain() -> Iterator[None]:
    """Keep the libraries from trying a hub that cannot be reached."""
    from datasets import config
    from huggingface_hub import constants

    offline: Any = (constants, config)
    before = [module.HF_HUB_OFFLINE for module in offline]
    for module in offline:
        module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or not hub_reachable()
    try:
        yield
    finally:
        for module, value in zip(offline, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _parse(spec: str) -> tuple[str, str | None, str | None]:
    name = spec.removeprefix(PREFIX)
    if not name:
        raise UserError("--data hub: lacks a name: write hub:NAME, e.g. hub:imdb.")
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), None, None
    name, _, revision = name.partition("@")
    name, _, config = name.partition(":")
    return name, config or None, revision or None


def _rows(dataset: "Dataset", source: str, columns: Columns) -> Rows:
    option = "--image" if columns.image else "--text"
    wanted = {**dict.fromkeys(columns.inputs, option), columns.label: "--label"}
    for name, option in wanted.items():
        if name not in dataset.column_names:
            raise UserError(
                f"{source} has no column {name!r} for {option}. "
                f"It has: {', '.join(dataset.column_names)}."
            )

    def where(index: int) -> str:
        return f"{source} row {index + 1}"

    if columns.image:
        inputs: Sequence[Raw] = _pictures(dataset, columns.inputs[0], source)
    else:
        inputs = joined([text_cells(list(dataset[name]), name, where) for name in columns.inputs])
    return Rows(inputs, _labels(dataset, columns.label, where), where, source)


def _labels(dataset: "Dataset", column: str, where: Where) -> list[str]:
    names = getattr(dataset.features[column], "names", None)
    values = list(dataset[column])
    if names is not None:
        values = [None if value is None or value < 0 else names[value] for value in values]
    return label_cells(values, column, where)


def _pictures(dataset: "Dataset", column: str, source: str) -> Lazy:
    """Return the pictures of a data set's column, decoded one at a time."""
    import datasets

    feature = dataset.features[column]
    if not isinstance(feature, datasets.Image):
        raise UserError(f"{source}: column {column!r} holds no pictures but {feature}.")
    encoded = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Lazy(partial(_picture, encoded, column, source), range(len(encoded)))


def _picture(encoded: "Dataset", column: str, source: str, index: int) -> Raw:
    cell = encoded[index][column]
    name = f"{source} row {index + 1}"
    if cell is None:
        raise UserError(f"{name} has no picture: leave the row out of the data set.")
    if cell["bytes"] is None:
        return open_image(Path(cell["path"]))
    return decode_image(io.BytesIO(cell["bytes"]), name, formats=FILE_FORMATS)
