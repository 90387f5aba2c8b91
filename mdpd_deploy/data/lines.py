"""Lines of a text file that a user names, with errors that name it."""

from pathlib import Path

from mdpd_deploy.errors import UserError


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
