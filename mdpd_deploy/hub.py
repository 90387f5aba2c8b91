"""The Hugging Face hub: is a model within reach, which commit did we get, and no talk on stderr."""

import contextlib
import logging
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from mdpd_deploy.errors import UserError


def check_hub(repo: str, files: Sequence[str], revision: str | None, option: str) -> None:
    """Fail at once, not after minutes of retries, when a hub model can be had from nowhere.

    Raises:
        UserError: If none of `files` is in the local cache and the hub's address does not resolve.
    """
    from huggingface_hub import constants

    if cached_commit(repo, files, revision) or hub_reachable():
        return
    raise UserError(
        f"{option} needs {repo} from {constants.ENDPOINT}, which cannot be reached from here, and "
        "no copy is cached: connect, or fetch it on another machine and name its folder instead."
    )


def cached_commit(repo: str, files: Sequence[str], revision: str | None) -> str | None:
    """Return the commit of the cached copy that `revision` (None: the main branch) names."""
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        path = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name  # .../snapshots/COMMIT/FILE
    return None


def hub_reachable() -> bool:
    """Return whether the hub's address resolves (or a proxy is set); False in offline mode."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Let only critical lines of these loggers, and no warning, out of the block."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
