"""Output folders: written whole or not at all, never over what must not be lost, never by two."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mdpd_deploy.errors import UserError
from mdpd_deploy.files import fsync_path, saying_disk_full

LOCK = ".lock"  # held by the program that writes to a folder


@contextlib.contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder; rename it to `folder` when the block succeeds.

    A folder that is replaced goes out of the way by a rename too: whoever is killed between the two
    leaves none, and the next program to come here puts the old one back before it starts.

    Raises:
        UserError: If `folder` holds files and `overwrite` is not set, also when another program has
            put them there in the meantime.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    replaced = temporary.with_suffix(".old.tmp")
    with saying_disk_full(folder):
        _clear_up_after_killed(folder)
        if not overwrite:
            refuse_nonempty(folder)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                fsync_path(file)
            if overwrite and folder.exists():
                os.replace(folder, replaced)
            _rename_to_free(temporary, folder)
            fsync_path(folder.parent)
        except BaseException:
            if replaced.exists() and not folder.exists():
                os.replace(replaced, folder)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def _rename_to_free(temporary: Path, folder: Path) -> None:
    """Rename; the system refuses to where another program has put files meanwhile."""
    try:
        os.replace(temporary, folder)
    except OSError as err:
        if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(
            f"another program has written to {folder} meanwhile: choose another --out."
        ) from err


def _clear_up_after_killed(folder: Path) -> None:
    """Delete temporary siblings of a folder whose program no longer runs on this machine.

    What it had moved out of the way for a new folder that never came is put back.
    """
    from psutil import pid_exists

    ours = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)(\.old)?\.tmp")
    for path in folder.parent.glob(".*.tmp"):
        found = ours.fullmatch(path.name)
        if not found or (int(found[1]) != os.getpid() and pid_exists(int(found[1]))):
            continue
        if found[2] and not folder.exists():
            os.replace(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def refuse_nonempty(
    folder: Path,
    *,
    overwrite: bool = False,
    ours: Callable[[Path], bool] | None = None,
    needed: Sequence[Path] = (),
) -> None:
    """Refuse an output folder that holds what must not be lost.

    Args:
        folder: Where something is to be written.
        overwrite: Whether a folder of the same kind may be replaced.
        ours: Whether a folder was written by the same verb; only such a one is ever replaced.
        needed: Inputs that must survive.

    Raises:
        UserError: If it is a file, holds files and may not be overwritten, holds what another
            wrote, or is where the inputs or the working directory are.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file: name a folder.")
    if not folder.is_dir() or not any(path.name != LOCK for path in folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--out {folder} is not empty: choose another folder or add --overwrite to replace it."
        )
    if ours is None or not ours(folder):
        raise UserError(
            f"--out {folder} holds files that this command did not write, and --overwrite replaces "
            "only what it wrote: choose another folder."
        )
    for place in (Path.cwd(), *needed):
        if place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {folder} holds {place}: choose another folder.")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders of a program that was killed in `folder`."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path, *, by: str = "training") -> Iterator[None]:
    """Hold a folder against other programs in the block; the system lets go of a killed one's.

    Args:
        folder: Made if need be.
        by: What may be holding it, for the message.

    Raises:
        UserError: If another program holds it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    with saying_disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another {by} is writing to {folder}: wait for it, or choose another --out."
            ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def is_claimed(folder: Path) -> bool:
    """Whether another program is inside `claimed` with this folder."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def free_path(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
