"""The content of a file of text: unpacked within a limit, and decoded as the user says."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from mdpd_deploy.errors import UserError

PACKED = ".gz"
MOST_TIMES = 100  # a packed table may grow by so much; texts grow 3 to 20 times
ALWAYS_BYTES = 64_000_000  # and any may grow to this


def read_text(path: Path, encoding: str | None) -> str:
    """Return a table's text, its line ends as they are, without a byte order mark.

    Args:
        path: The file; one that ends in `.gz` is unpacked.
        encoding: A name Python knows; None = UTF-8.

    Raises:
        UserError: If the file is damaged, in another encoding, or unpacks to too much.
        OSError: If it cannot be read.
    """
    content = _unpacked(path) if path.suffix.lower() == PACKED else path.read_bytes()
    try:
        return content.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeError as err:
        at = f" (byte {err.start})" if isinstance(err, UnicodeDecodeError) else ""
        mend = (
            "correct data.encoding"
            if encoding
            else "save it with UTF-8 encoding (to train on it as it is, name its encoding, e.g. "
            "--set data.encoding=latin-1)"
        )
        raise UserError(f"{path} is not {encoding or 'UTF-8'} text{at}: {mend}.") from None


def read_lines(path: Path, hint: str) -> list[str]:
    """Return the lines of a UTF-8 file without their ends; only LF and CR LF end a line.

    `str.splitlines` would also cut at U+0085 and U+2028, which occur inside real sentences.

    Args:
        path: The file.
        hint: What to do if it does not exist.

    Raises:
        UserError: If the file is missing, unreadable or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {hint}") from None
    except UnicodeDecodeError as err:
        raise UserError(
            f"{path} is not UTF-8 text (byte {err.start}): save it with UTF-8 encoding."
        ) from None
    except OSError as err:
        raise UserError(f"{path} cannot be read ({err.strerror or err}).") from err
    return [line.removesuffix("\r") for line in text.split("\n")]


def most_bytes(path: Path) -> int:
    """Return how many bytes a packed file may unpack to."""
    return max(ALWAYS_BYTES, MOST_TIMES * path.stat().st_size)


def too_large(path: Path) -> UserError:
    """Build the error for a packed file that grows beyond its limit."""
    return UserError(
        f"{path} unpacks to more than {MOST_TIMES} times its size, which no table of texts does: "
        "if it is sound, unpack it first."
    )


def suffixes(path: Path) -> Sequence[str]:
    """Return a name's last endings in lower case, e.g. `(".csv", ".gz")`."""
    found = [suffix.lower() for suffix in path.suffixes]
    return found[-2:] if found[-1:] == [PACKED] else found[-1:]


def _unpacked(path: Path) -> bytes:
    limit = most_bytes(path)
    try:
        with gzip.open(path) as stream:
            content = stream.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise UserError(f"{path} is no sound gzip file ({err}): pack it again.") from err
    if len(content) > limit:
        raise too_large(path)
    return content
