"""The run directory: what training leaves on disk, written and read in this one place.

    RUN/config.yaml  metrics.jsonl  summary.json  report.html  outputs.safetensors
    RUN/checkpoints/   see train/checkpoint.py
    RUN/model/         delta.safetensors  side.safetensors  adapter.safetensors  labels.json
                       preprocess.json (+ tokenizer.json)   backbone.safetensors

`delta.safetensors` holds every tensor of the deployed model that differs from the backbone as
loaded: `backbone.<name>` and `head.<name>`. `side.safetensors` holds `side.<name>`,
`side_head.<name>` and, for ablations, `distiller.<name>`. `adapter.safetensors` holds
`tokens.<name>` of virtual tokens, or `adapter.<name>` of an adapter that is merged in the delta.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from mdpd_deploy.config import Config, read_config
from mdpd_deploy.data.check import check_images, readable
from mdpd_deploy.data.examples import Field, Split, TaskData
from mdpd_deploy.data.glue import GLUE
from mdpd_deploy.data.load import load_evaluation, load_task
from mdpd_deploy.data.preprocess import ImagePreprocess, Preprocess, load_preprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import read_json, sha256_file
from mdpd_deploy.tasks import Task, task_of

if TYPE_CHECKING:
    from torch import Tensor

    from mdpd_deploy.backbones import Backbone
    from mdpd_deploy.model import Deployed, TaskModel, WithSide, WithTokens
    from mdpd_deploy.tasks.head import Head

SCHEMA = 1
RUNS = Path("runs")
DELTA, SIDE, ADAPTER = "delta.safetensors", "side.safetensors", "adapter.safetensors"
BACKBONE = "backbone.safetensors"
LABELS = "labels.json"
_NEEDED = ("task", "kind", "method", "backbone", "metrics", "files")  # of summary.json


@dataclass(frozen=True)
class Run:
    """A completed run.

    Attributes:
        path: The run's folder.
        config: Every resolved option.
        summary: The content of summary.json.
        task: What it learnt.
    """

    path: Path
    config: Config
    summary: dict[str, Any]
    task: Task

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
                f"the run {folder} is not finished: `mdpd train --resume {quote(str(folder))}` ends it."
            )
        summary = read_json(folder / "summary.json", "run")
        sound = isinstance(summary, dict) and all(name in summary for name in _NEEDED)
        if not sound or summary.get("schema") != SCHEMA:
            raise UserError(f"{folder}/summary.json was not written by this version of mdpd.")
        kind = summary["kind"]
        run = cls(folder, read_config(folder / "config.yaml"), summary, task_of(kind))
        labels = read_json(run.model_file(LABELS), "run")
        return replace(run, task=task_of(kind, labels["names"]))

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
    def keeps(self) -> Literal["side network", "virtual tokens"] | None:
        """What stays beside the backbone at inference; None when nothing does."""
        from mdpd_deploy.adapters import TOKENS

        if self.config.method == "side":
            return "side network"
        return "virtual tokens" if self.config.method in TOKENS else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that inputs come from: one for each field."""
        config = self.config.data
        family, _, member = self.config.task.partition("/")
        if family == "glue" and member in GLUE:
            return GLUE[member].text
        if config.text:
            return tuple(config.text)
        takes = self.preprocess.takes
        return ((config.image if takes == "image" else None) or takes,)

    @property
    def fields(self) -> tuple[Field, ...]:
        """What one input is made of, in order."""
        return (self.preprocess.takes,) * len(self.columns)

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
            self.task,
            self._data_config(eval_path),
            seed=self.config.train.seed,
        )
        if self.config.data.bad_images == "skip" and isinstance(self.preprocess, ImagePreprocess):
            splits, _ = readable(splits, self.config.data)
        return splits

    def _data_config(self, eval_path: str | None) -> Any:
        update: dict[str, Any] = {"labels": list(self.task.labels) or None}
        if eval_path is not None:
            update["eval_path"] = eval_path
        return self.config.data.model_copy(update=update)

    # --- models; torch is imported here and not above --------------------------------------

    def load_backbone(self) -> Backbone:
        """Load the frozen backbone as it was before training (float32, eval mode).

        Raises:
            UserError: If its weights are not the ones the run was trained on.
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

    def load_deployed(self) -> TaskModel:
        """Load the model that is deployed, float32, eval mode: backbone with tuned weights + head.

        It has a side network or virtual tokens beside it where the method `keeps` them.
        """
        if self.keeps == "side network":
            return self.load_with_side()[0]
        if self.keeps == "virtual tokens":
            return self.load_with_tokens(self.config.method)[0]
        return self._deployed(tuned=True)

    def load_bare(self) -> Deployed:
        """Load the same head on the backbone's own untouched norms, the floor of any latency."""
        return self._deployed(tuned=False)

    def load_merged(self, method: str) -> tuple[Deployed, bool]:
        """Load what a method deploys that only changes values of the backbone: full, lora, ….

        Returns:
            The model (float32, eval mode), and whether `method` is the run's own. Another one's has
            the untouched backbone's values: its graph is the same.
        """
        trained = method == self.config.method
        return self._deployed(tuned=trained), trained

    def load_unmerged(self, method: str) -> tuple[Deployed, bool]:
        """Load the backbone with the layers of an adapter beside its own, and the head.

        Args:
            method: A name of LAYERS, e.g. lora.

        Returns:
            The model (float32, eval mode), and whether the adapter is the trained one. One the run
            did not train has random values.
        """
        import torch

        from mdpd_deploy.adapters import inject
        from mdpd_deploy.model import Deployed

        trained = method == self.config.method
        backbone = self.load_backbone()
        head = self._own_head(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject(backbone, method, self.config.peft, random=not trained)
        if trained:
            self._fill(backbone, _below(self._tensors(ADAPTER), "adapter."), ADAPTER)
        return Deployed(backbone, head).eval(), trained

    def load_with_tokens(self, method: str) -> tuple[WithTokens, bool]:
        """Load the backbone with virtual tokens, e.g. prompt; what comes is as above."""
        import torch

        from mdpd_deploy.adapters import build_tokens
        from mdpd_deploy.model import WithTokens

        trained = method == self.config.method
        backbone = self.load_backbone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokens = build_tokens(backbone, method, self.config.peft)
        if trained:
            _load(tokens, _below(self._tensors(ADAPTER), "tokens."), self.path)
        return WithTokens(backbone, tokens, self._own_head(backbone)).eval(), trained

    def load_with_side(
        self, name: str | None = None, *, late_layers: int = 1
    ) -> tuple[WithSide, bool]:
        """Load the backbone with a side network at inference.

        Args:
            name: A side network; None means the run's own.
            late_layers: SHERL enters at least so many blocks anew.

        Returns:
            The model (float32, eval mode), and whether its side network is the trained one. One
            the run did not train has random values at the run's reduction.
        """
        import torch

        from mdpd_deploy.model import WithSide
        from mdpd_deploy.sides import build_side, other_side

        backbone = self.load_backbone()
        config = other_side(self.config.side, name or self.config.side.name)
        if late_layers > config.late_layers:
            config = config.model_copy(update={"late_layers": late_layers})
        trained = (self.path / "model" / SIDE).is_file() and config == self.config.side
        last_feature = trained and self.config.distill.side_head == "paper"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            side = build_side(backbone, config, last_feature=last_feature)
            head = self.task.new_head(side.pooled_width(backbone))
        if trained:
            tensors = self._tensors(SIDE)
            _load(side, _below(tensors, "side."), self.path)
            _load(head, _below(tensors, "side_head."), self.path)
            if self.config.distill.teacher == "tuned":  # else it learnt on the backbone as it was
                self._tune(backbone)
        return WithSide(backbone, side, head).eval(), trained

    def _deployed(self, *, tuned: bool) -> Deployed:
        from mdpd_deploy.model import Deployed

        backbone = self.load_backbone()
        head = self._own_head(backbone)
        if tuned:
            self._tune(backbone)
        return Deployed(backbone, head).eval()

    def _own_head(self, backbone: Backbone) -> Head:
        """Return the trained head of the deployed model."""
        head = self.task.new_head(backbone.width)
        kept = self.keeps == "side network"
        source, prefix = (SIDE, "side_head.") if kept else (DELTA, "head.")
        _load(head, _below(self._tensors(source), prefix), self.path)
        return head

    def _tune(self, backbone: Backbone) -> None:
        """Put the trained values into a backbone."""
        self._fill(backbone, _below(self._tensors(DELTA), "backbone."), DELTA)

    def _fill(self, backbone: Backbone, values: dict[str, Tensor], file: str) -> None:
        """Copy named values from a file of the run into a backbone."""
        weights = dict(backbone.named_parameters())
        for name, value in values.items():
            if name not in weights or weights[name].shape != value.shape:
                raise UserError(f"{self.path}/model/{file} does not fit the backbone ({name}).")
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
    """Return the latest completed run below a folder."""
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
