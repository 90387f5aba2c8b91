"""What users see when something is wrong: one sentence with the mend.

    MdpdError
    ├── UserError            bad usage or bad input           exit code 2
    └── WorkFailed           the work itself failed           exit code 1
        ├── ExportError      an export could not be made
        └── VerificationError  an artefact did not pass a gate

Anything else that escapes is a bug of ours (exit code 1; `--debug` shows the traceback).
"""

from collections.abc import Iterable
from difflib import get_close_matches


class MdpdError(Exception):
    """Base of every error with a message meant for the user."""

    exit_code = 1


class UserError(MdpdError):
    """What the user gave cannot work; the message says what, where, and the mend."""

    exit_code = 2


class WorkFailed(MdpdError):
    """The input was fine but the work failed (divergence, disk full, a failed gate)."""


class ExportError(WorkFailed):
    """The model could not be exported."""


class VerificationError(WorkFailed):
    """An artefact did not pass one of its gates."""


def unknown(what: str, given: object, choices: Iterable[str]) -> UserError:
    """Build the error for a name that is not one of `choices`, with the nearest one suggested."""
    names = sorted(choices)
    near = get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"{what}: unknown {given!r}.{hint} Choose one of: {', '.join(names)}.")


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """Build the error for an optional package that is not installed."""
    return UserError(
        f"{purpose} needs the package {package!r}, which is not installed: "
        f'pip install "mdpd-deploy[{extra}]"'
    )


def printable(text: str) -> str:
    """Return a stranger's text on one line that any terminal can show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
