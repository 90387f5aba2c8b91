"""Checkpoints: safetensors + JSON, complete or absent, small (trained tensors only).

    RUN/checkpoints/step-00000120/state.safetensors   trained/…, optimiser/…, method/…, random/…
                                  state.json          progress, and the SHA-256 of the tensors
    RUN/checkpoints/best.safetensors                  trained/… of the best evaluation

A checkpoint appears by rename; the one before it is deleted only then.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdpd_deploy.errors import UserError
from mdpd_deploy.files import atomic_path, read_json, sha256_file, write_json
from mdpd_deploy.folders import atomic_folder
from mdpd_deploy.train.methods import Method
from mdpd_deploy.train.optim import load_optimizer_tensors, optimizer_tensors

SCHEMA = 1
TENSORS = "state.safetensors"


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


def save_checkpoint(
    folder: Path,
    method: Method,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: str,
    data: str,
) -> None:
    """Write `folder/step-N` and delete older ones.

    Args:
        folder: RUN/checkpoints.
        method: Gives the trained tensors, and what else it must know to go on.
        optimizer: Gives its state.
        progress: Goes into state.json.
        config: The run's config as YAML; a resume refuses another one.
        data: The fingerprint of its examples; a resume refuses others.
    """
    tensors = {f"trained/{k}": t for k, t in method.trained_state().items()}
    tensors |= {f"optimiser/{k}": t for k, t in optimizer_tensors(optimizer).items()}
    tensors |= {f"method/{k}": t for k, t in method.extra_state().items()}
    tensors |= random_tensors()
    target = folder / f"step-{progress.step:08d}"
    with atomic_folder(target, overwrite=True) as temporary:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary / TENSORS)
        state = {
            "schema": SCHEMA,
            "config": config,
            "data": data,
            "sha256": sha256_file(temporary / TENSORS),
            "progress": asdict(progress),
        }
        write_json(temporary / "state.json", state)
    for old in complete_checkpoints(folder):
        if old != target:
            shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_checkpoint(
    path: Path, method: Method, optimizer: torch.optim.Optimizer, config: str, data: str
) -> Progress:
    """Restore a checkpoint in place and return where it stood.

    Raises:
        UserError: If it is damaged, of another version or of another config.
    """
    state = read_json(path / "state.json", "checkpoint")
    mend = f"delete {path} to start from the beginning"
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"checkpoint {path} was not written by this version; {mend}.")
    if state["config"] != config:
        raise UserError(f"checkpoint {path} belongs to another config.yaml; {mend}.")
    if state["data"] != data:
        raise UserError(
            f"the run's data are not the examples that checkpoint {path} was trained on: restore "
            f"them, or {mend}."
        )
    try:
        if sha256_file(path / TENSORS) != state["sha256"]:
            raise UserError(f"checkpoint {path} is damaged (its SHA-256 differs); {mend}.")
        tensors = load_file(path / TENSORS)
        method.load_trained_state(_below(tensors, "trained/"))
    except (OSError, SafetensorError, KeyError, RuntimeError) as err:
        raise UserError(f"checkpoint {path} does not fit this run ({err}); {mend}.") from err
    load_optimizer_tensors(optimizer, _below(tensors, "optimiser/"))
    method.load_extra_state(_below(tensors, "method/"))
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return Progress(**state["progress"])


def save_best(folder: Path, method: Method) -> None:
    """Write the present trained tensors as the best ones."""
    tensors = {k: t.cpu().contiguous() for k, t in method.trained_state().items()}
    with atomic_path(folder / "best.safetensors") as temporary:
        save_file(tensors, temporary)


def load_best(folder: Path, method: Method) -> None:
    """Put the best trained tensors back in place."""
    path = folder / "best.safetensors"
    try:
        method.load_trained_state(load_file(path))
    except (OSError, SafetensorError, KeyError, RuntimeError) as err:
        raise UserError(
            f"{path} is damaged or of another run ({err}): delete the run's checkpoints folder "
            "and start it again."
        ) from err


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
