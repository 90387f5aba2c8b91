"""Writing files so that nothing is left half-written, and reading our own back."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mdpd_deploy.errors import UserError, WorkFailed

Read = Callable[[Path], bytes]  # how a file comes into memory, whole

MOST_VALUES = 500_000  # in one JSON file; a bundle of 512 tasks has some 100,000

_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


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
        elif err.errno in _NO_PLACE:
            raise UserError(
                f"{path} cannot be written ({err.strerror}): choose another --out."
            ) from err
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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: two-space indent, sorted only where the caller sorted, no NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str, read: Read = Path.read_bytes) -> Any:
    """Read a JSON file of ours; raises `UserError` that names it when missing, damaged or huge."""
    try:
        raw = read(path)
        if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")  # an empty list takes 56 bytes
        return json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as err:  # also numbers of 5000 digits, and depth
        raise UserError(f"{what}: {path} is not readable JSON ({err}).") from None
