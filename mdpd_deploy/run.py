"""The run directory: what training leaves on disk, written and read in this one place.

    RUN/config.yaml  metrics.jsonl  summary.json  report.html
    RUN/checkpoints/   see train/checkpoint.py
    RUN/model/         delta.safetensors  side.safetensors  labels.json
                       preprocess.json (+ tokenizer.json)   backbone.safetensors (D12)

`delta.safetensors` holds every tensor of the deployed model that differs from the backbone as
loaded: `backbone.<norm name>` and `head.<name>`. `side.safetensors` holds `side.<name>`,
`side_head.<name>` and, for ablations, `distiller.<name>`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdpd_deploy.config import Config, read_config
from mdpd_deploy.data import check_images, load_evaluation, load_task, readable
from mdpd_deploy.data.examples import Split, TaskData
from mdpd_deploy.data.preprocess import ImagePreprocess, Preprocess, load_preprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import read_json, sha256_file

if TYPE_CHECKING:
    from torch import Tensor

    from mdpd_deploy.backbones import Backbone
    from mdpd_deploy.model import Deployed, WithSide
    from mdpd_deploy.tasks.head import Head

SCHEMA = 1
RUNS = Path("runs")
DELTA, SIDE, BACKBONE = "delta.safetensors", "side.safetensors", "backbone.safetensors"
LABELS = "labels.json"
_NEEDED = ("task", "method", "backbone", "metrics", "files")  # of summary.json


@dataclass(frozen=True)
class Run:
    """A completed run.

    Attributes:
        path: The run's folder.
        config: Every resolved option.
        summary: The content of summary.json.
        label_names: Class names in index order; empty for regression.
    """

    path: Path
    config: Config
    summary: dict[str, Any]
    label_names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path | str | None = None) -> Run:
        """Open a completed run; None means the newest one under `runs/`.

        Raises:
            UserError: If there is none, or the folder is no completed run of this version.
        """
        folder = newest_run(RUNS) if path is None else Path(path)
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"{folder} is not a run directory (it has no config.yaml): "
                "name a folder that `mdpd train` wrote."
            )
        if not (folder / "summary.json").is_file():
            raise UserError(
                f"the run {folder} is not finished: `mdpd train --resume {folder}` ends it."
            )
        summary = read_json(folder / "summary.json", "run")
        sound = isinstance(summary, dict) and all(name in summary for name in _NEEDED)
        if not sound or summary.get("schema") != SCHEMA:
            raise UserError(f"{folder}/summary.json was not written by this version of mdpd.")
        run = cls(folder, read_config(folder / "config.yaml"), summary, ())
        labels = read_json(run.model_file(LABELS), "run")
        return replace(run, label_names=tuple(labels["names"]))

    def model_file(self, name: str) -> Path:
        """Return a file of RUN/model; raises `UserError` unless it is as training wrote it."""
        path = self.path / "model" / name
        try:
            sound = sha256_file(path) == self.summary["files"][name]
        except (OSError, KeyError, TypeError) as err:
            raise UserError(f"{path} is missing: train the run again.") from err
        if not sound:
            raise UserError(f"{path} is damaged (its SHA-256 differs): train the run again.")
        return path

    @property
    def keeps_side(self) -> bool:
        """Whether the side network stays at inference (`--method side`)."""
        return self.config.method == "side"

    @cached_property
    def preprocess(self) -> Preprocess:
        """The preprocessing that was saved with the model."""
        return load_preprocess(self.path / "model")

    def load_task_data(self) -> TaskData:
        """Read the run's own data again, classes in the trained order."""
        data = load_task(self.config.task, self._data_config(None), seed=self.config.train.seed)
        if self.config.data.bad_images == "skip":
            data = check_images(data, self.config.data)
        return data

    def load_evaluation(self, eval_path: str | None = None) -> dict[str, Split]:
        """Read the splits to measure; `eval_path` replaces the run's own evaluation data."""
        if eval_path is None:  # the same split as in training, also where it was made by a seed
            return self.load_task_data().evaluation
        splits = load_evaluation(
            self.config.task,
            self._data_config(eval_path),
            seed=self.config.train.seed,
            label_names=self.label_names,
        )
        if self.config.data.bad_images == "skip" and isinstance(self.preprocess, ImagePreprocess):
            splits, _ = readable(splits, self.config.data)
        return splits

    def _data_config(self, eval_path: str | None) -> Any:
        update: dict[str, Any] = {"labels": list(self.label_names) or None}
        if eval_path is not None:
            update["eval_path"] = eval_path
        return self.config.data.model_copy(update=update)

    # --- models; torch is imported here and not above (D27) --------------------------------------

    def load_backbone(self) -> Backbone:
        """Load the frozen backbone as it was before training (float32, eval mode).

        Raises:
            UserError: If its weights are not the ones the run was trained on (D12).
        """
        from mdpd_deploy.backbones import load_backbone

        kept = self.model_file(BACKBONE) if BACKBONE in self.summary["files"] else None
        backbone = load_backbone(
            self.config.backbone,
            max_length=self.config.data.max_length,
            pad=self.config.data.pad,
            weights_file=kept,
        )
        expected = self.summary["backbone"]["sha256"]
        if backbone.source.sha256 != expected:
            raise UserError(
                f"the backbone {self.config.backbone.name} has changed since the run {self.path} "
                f"was trained (SHA-256 {backbone.source.sha256[:12]}… instead of "
                f"{expected[:12]}…): restore the weights it was trained on, or train again."
            )
        return backbone

    def load_deployed(self) -> Deployed | WithSide:
        """Load the model that is deployed: backbone with tuned norms + head, float32, eval mode.

        For `--method side` that is the backbone with its side network.
        """
        if self.keeps_side:
            return self.load_with_side()[0]
        return self._deployed(tuned=True)

    def load_bare(self) -> Deployed:
        """Load the same head on the backbone's own untouched norms, the floor of any latency."""
        return self._deployed(tuned=False)

    def load_with_side(self, name: str | None = None) -> tuple[WithSide, bool]:
        """Load the backbone with a side network at inference.

        Args:
            name: A side network; None means the run's own.

        Returns:
            The model (float32, eval mode), and whether its side network is the trained one. One
            the run did not train has random values at the run's reduction (D23).
        """
        import torch

        from mdpd_deploy.model import WithSide
        from mdpd_deploy.sides import build_side, other_side

        backbone = self.load_backbone()
        config = self.config.side
        trained = (self.path / "model" / SIDE).is_file() and name in (None, config.name)
        last_feature = trained and self.config.distill.side_head == "paper"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            side = build_side(
                backbone,
                other_side(config, name) if name else config,
                last_feature=last_feature,
            )
            head = self._head(side.width if last_feature else backbone.width)
        if trained:
            tensors = self._tensors(SIDE)
            _load(side, _below(tensors, "side."), self.path)
            _load(head, _below(tensors, "side_head."), self.path)
            self._tune(backbone)
        return WithSide(backbone, side, head, last_feature=last_feature).eval(), trained

    def _deployed(self, *, tuned: bool) -> Deployed:
        from mdpd_deploy.model import Deployed

        backbone = self.load_backbone()
        head = self._head(backbone.width)
        source, prefix = (SIDE, "side_head.") if self.keeps_side else (DELTA, "head.")
        _load(head, _below(self._tensors(source), prefix), self.path)
        if tuned:
            self._tune(backbone)
        return Deployed(backbone, head).eval()

    def _head(self, width: int) -> Head:
        from mdpd_deploy.tasks.head import Head

        scale = None if self.label_names else (0.0, 1.0)  # loaded with the head's tensors
        return Head(width, len(self.label_names) or 1, scale)

    def _tune(self, backbone: Backbone) -> None:
        """Put the trained values into a backbone."""
        tuned = _below(self._tensors(DELTA), "backbone.")
        weights = dict(backbone.named_parameters())
        for name, value in tuned.items():
            if name not in weights or weights[name].shape != value.shape:
                raise UserError(f"{self.path}/model/{DELTA} does not fit the backbone ({name}).")
            weights[name].data.copy_(value)

    def _tensors(self, file: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.model_file(file)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as err:
            raise UserError(f"{path} is missing or damaged ({err}): train the run again.") from err


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _load(module: Any, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as err:
        reason = str(err).splitlines()[-1].strip()
        raise UserError(f"the model in {path} does not fit its config.yaml: {reason}") from err


def newest_run(root: Path) -> Path:
    """Return the latest completed run below a folder (D19)."""
    runs = [path.parent for path in root.glob("*/summary.json")]
    if not runs:
        raise UserError(
            f"no completed run under {root}/: name a run folder, or make one with `mdpd train`."
        )
    return max(runs, key=lambda run: (run / "summary.json").stat().st_mtime_ns)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
