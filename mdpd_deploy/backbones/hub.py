"""The Hugging Face hub: is a model within reach, and which commit did we get."""

from collections.abc import Sequence
from pathlib import Path

from mdpd_deploy.errors import UserError
from mdpd_deploy.network import hub_reachable


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
