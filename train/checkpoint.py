"""Checkpoints: safetensors + JSON, complete or absent, small (trained tensors only).

    RUN/checkpoints/step-00000120/state.safetensors   trained/…, optimiser/…, method/…, mean/…,
                                                      random/…
                                  state.json          progress; SHA-256 of the tensors and of itself
    RUN/checkpoints/best.safetensors                  trained/… of the best evaluation, and theirs

A checkpoint appears by rename. The one before it is kept, for the case that the newest is damaged.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from mdpd_deploy.artifacts.folders import atomic_folder
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import atomic_path, read_json, sha256_file, write_json
from mdpd_deploy.train.mean import WeightMean
from mdpd_deploy.train.methods import Method
from mdpd_deploy.train.optim import load_optimizer_tensors, optimizer_tensors

SCHEMA = 2
TENSORS = "state.safetensors"
KEPT = 2


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: Optimiser steps done.
        best: Best primary validation metric so far; None while none was defined.
        best_step: The step whose weights are kept; 0 before the first evaluation.
        stale: Evaluations since then.
        train_s: Seconds spent training, over all starts of the run.
        samples: Training examples seen.
        memory: The memory measured on the first steps.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    train_s: float = 0.0
    samples: int = 0
    memory: dict[str, Any] | None = None

    @property
    def samples_per_s(self) -> float | None:
        """Throughput of training alone, without evaluations; None before the first timed step."""
        return self.samples / self.train_s if self.train_s else None


def random_tensors() -> dict[str, Tensor]:
    """Return the states of the generators that training draws from."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: RUN/checkpoints.
        method: Gives and takes the trained tensors, and what else it must know to go on.
        optimizer: Gives and takes its state.
        mean: Gives and takes the mean of the trained tensors, where there is one.
        config: The run's config as YAML; a checkpoint of another one is refused.
        data: The fingerprint of its examples; a checkpoint of others is refused.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        optimizer: Optimizer,
        mean: WeightMean,
        config: str,
        data: str,
    ) -> None:
        self.folder, self.method, self.optimizer, self.mean = folder, method, optimizer, mean
        self.config, self.data = config, data

    def save(self, progress: Progress) -> None:
        """Write `step-N`, with `progress` in its state.json; delete those before the last one."""
        tensors = {f"trained/{k}": t for k, t in self.method.trained_state().items()}
        tensors |= {f"optimiser/{k}": t for k, t in optimizer_tensors(self.optimizer).items()}
        tensors |= {f"method/{k}": t for k, t in self.method.extra_state().items()}
        tensors |= {f"mean/{k}": t for k, t in self.mean.tensors.items()}
        tensors |= random_tensors()
        with atomic_folder(self.folder / f"step-{progress.step:08d}", overwrite=True) as folder:
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, folder / TENSORS)
            state = {
                "schema": SCHEMA,
                "config": self.config,
                "data": self.data,
                "sha256": sha256_file(folder / TENSORS),
                "progress": asdict(progress),
            }
            write_json(folder / "state.json", {**state, "digest": _digest(state)})
        for old in self._complete()[:-KEPT]:
            shutil.rmtree(old)

    def load_newest(self, say: Callable[[str], None]) -> Progress | None:
        """Restore the newest sound checkpoint in place; None where there is none at all.

        Args:
            say: Told which one is damaged, where an older one takes its place.

        Raises:
            UserError: If all are damaged, or it is of another version, config or data.
        """
        found = self._complete()
        while found:
            path = found.pop()
            try:
                return self._load(path)
            except DamagedCheckpoint as err:
                if not found:
                    raise
                say(f"{str(err).partition(';')[0]}; going on from {found[-1].name}")
        return None

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _load(self, path: Path) -> Progress:
        mend = f"delete {path} to start from the beginning"
        state = _read_state(path, mend)
        if state["config"] != self.config:
            raise UserError(f"checkpoint {path} belongs to another config.yaml; {mend}.")
        if state["data"] != self.data:
            raise UserError(
                f"the run's data are not the examples that checkpoint {path} was trained on: "
                f"restore them, or {mend}."
            )
        tensors = _read_tensors(path, state["sha256"], mend)
        try:
            self.method.load_trained_state(_below(tensors, "trained/"))
            load_optimizer_tensors(self.optimizer, _below(tensors, "optimiser/"))
            self.method.load_extra_state(_below(tensors, "method/"))
            self.mean.load(_below(tensors, "mean/"))
            torch.set_rng_state(tensors["random/cpu"])
        except (KeyError, RuntimeError, TypeError) as err:
            raise UserError(f"checkpoint {path} does not fit this run ({err}); {mend}.") from err
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
        return Progress(**state["progress"])


def _digest(state: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of what a state.json holds beside it."""
    plain = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path, mend: str) -> dict[str, Any]:
    """Return the state.json of a checkpoint, every field in place and as it was written."""
    try:
        state = read_json(path / "state.json", "checkpoint")
    except UserError as err:
        raise DamagedCheckpoint(f"{str(err).removesuffix('.')}; {mend}.") from err
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"checkpoint {path} was not written by this version; {mend}.")
    missing = {"config", "data", "sha256", "progress", "digest"} - state.keys()
    if not missing and isinstance(state["progress"], dict):
        missing = {field.name for field in fields(Progress)} ^ state["progress"].keys()
    if missing:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged (state.json and {min(missing)!r}); {mend}."
        )
    if state["digest"] != _digest(state):
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged (the SHA-256 of state.json differs); {mend}."
        )
    return state


def _read_tensors(path: Path, sha256: str, mend: str) -> dict[str, Tensor]:
    try:
        if sha256_file(path / TENSORS) == sha256:
            return load_file(path / TENSORS)
    except (OSError, SafetensorError) as err:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged ({err}); {mend}.") from err
    raise DamagedCheckpoint(f"checkpoint {path} is damaged (its SHA-256 differs); {mend}.")


def save_best(folder: Path, method: Method) -> None:
    """Write the present trained tensors as the best ones."""
    tensors = {k: t.cpu().contiguous() for k, t in method.trained_state().items()}
    with atomic_path(folder / "best.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"sha256": _tensors_sha256(tensors)})


def load_best(folder: Path, method: Method) -> None:
    """Put the best trained tensors back in place.

    Raises:
        UserError: If they are not as they were written, or of another run.
    """
    path = folder / "best.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("sha256")
        tensors = load_file(path)
        if _tensors_sha256(tensors) != written:
            raise ValueError("its SHA-256 differs")
        method.load_trained_state(tensors)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as err:
        raise UserError(
            f"{path} is damaged or of another run ({err}): delete the run's checkpoints folder "
            "and start it again."
        ) from err


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
