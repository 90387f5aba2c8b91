"""Writing files so that an interrupted program leaves nothing half-written."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mdpd_deploy.errors import UserError, WorkFailed


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Ask the system to put a file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def saying_disk_full(path: Path) -> Iterator[None]:
    """Turn a failed write into one sentence that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as err:
        if isinstance(err, SafetensorError):  # it wraps a failed write in words of its own
            reason = str(err).rpartition("I/O error: ")[2]
        elif err.errno is None:
            raise
        else:
            reason = err.strerror or str(err)
        raise WorkFailed(
            f"could not write {path}: {reason}. "
            "Free some space or choose another --out; nothing half-written was left behind."
        ) from err


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` when the block succeeds."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with saying_disk_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder; rename it to `folder` when the block succeeds.

    Raises:
        UserError: If `folder` holds files and `overwrite` is not set.
    """
    refuse_nonempty(folder, overwrite=overwrite)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    with saying_disk_full(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                fsync_path(file)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            fsync_path(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_nonempty(folder: Path, *, overwrite: bool) -> None:
    """Raise `UserError` when `folder` is a file, or holds files and may not be overwritten."""
    if folder.is_file():
        raise UserError(f"--out {folder} is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"--out {folder} is not empty: choose another folder or add --overwrite to replace it."
        )


def free_path(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: two-space indent, sorted only where the caller sorted, no NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of ours; raises `UserError` that names it when missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise UserError(f"{what}: {path} is not readable JSON ({err}).") from None
