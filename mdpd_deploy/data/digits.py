"""The embedded default task: scikit-learn's handwritten digits, 1,797 grey pictures of 8 x 8.

Real data that ships with scikit-learn, so it needs no network: 1,000 to train on and 797 for
validation, split by class with the run's seed.
"""

import numpy as np
from PIL import Image

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble
from mdpd_deploy.data.examples import Indices, Raw, TaskData
from mdpd_deploy.data.rows import TASKS, Rows, Source, refuse_options
from mdpd_deploy.data.splits import stratified_split
from mdpd_deploy.tasks import Classify

VALIDATION = 797


@TASKS.register("digits")
def read_digits(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Return the digits; no data option but `limit` and `labels` applies."""
    from sklearn.datasets import load_digits

    unused = ("path", "eval_path", "text", "image", "label", "encoding", "splits")
    refuse_options(task, config, *unused)
    pixels, target = (np.asarray(part) for part in load_digits(return_X_y=True))
    grey = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 levels → 8 bit
    train, validation = stratified_split(target.astype(np.int64), VALIDATION, seed)

    def rows(indices: Indices, split: str) -> Rows:
        pictures: list[Raw] = [Image.fromarray(grey[i]) for i in indices]
        labels = [str(target[i]) for i in indices]
        return Rows(pictures, labels, lambda i: f"digits {split} row {i + 1}", f"digits {split}")

    source = Source(
        {"train": rows(train, "train"), "validation": rows(validation, "validation")},
        ("image",),
        names=tuple(str(digit) for digit in range(10)),
    )
    return assemble(task, Classify.kind, source, config, seed=seed)
