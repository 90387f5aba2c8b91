"""Opening pictures that strangers made: safe limits, one RGB frame, upright.

JPEG, PNG and WebP, and from files and data sets also TIFF, BMP and GIF; at most `MAX_PIXELS`, read from the header before anything is decoded
(a 20 kB PNG can decode to half a gigabyte); frame 0 of an animation; the EXIF rotation applied;
16-bit grey scaled to 8 bit, where Pillow's own conversion would clip it to white.
"""

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mdpd_deploy.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")  # of what is sent by strangers
FILE_FORMATS = (*FORMATS, "TIFF", "BMP", "GIF")  # of the user's own files
SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 40_000_000

_header_lock = threading.Lock()  # catch_warnings is not thread-safe


def open_image(picture: Path | Image.Image) -> Image.Image:
    """Return a picture as upright RGB, fully decoded.

    Args:
        picture: A file, or a picture in memory (not modified).

    Raises:
        UserError: If the file is missing, of none of `FILE_FORMATS`, damaged or truncated, or
            larger than `MAX_PIXELS`; the message names it.
    """
    if isinstance(picture, Image.Image):
        name = getattr(picture, "filename", "") or "the picture"
        _check_size(picture, str(name))
        return _to_rgb(picture, str(name))
    try:
        with picture.open("rb") as stream:
            return decode_image(stream, str(picture), formats=FILE_FORMATS)
    except OSError as err:
        raise UserError(
            f"the picture {picture} cannot be opened ({err.strerror or err}): "
            "correct the path or the file's permissions."
        ) from err


def looks_like_picture(path: Path) -> bool:
    """Tell whether a file is a picture by its ending, or where it has none by its header."""
    if path.suffix:
        return path.suffix.lower() in SUFFIXES
    try:
        with path.open("rb") as stream:
            _open_header(stream, FILE_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return True  # reading it will say that it is too large
    except Exception:  # noqa: BLE001 - whatever a decoder stumbles on is no picture
        return False
    return True


def _open_header(stream: BinaryIO, formats: Sequence[str]) -> Image.Image:
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(stream, formats=list(formats))


def decode_image(stream: BinaryIO, name: str, *, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Return the picture in a stream as upright RGB; messages call it `name`.

    Raises:
        UserError: As `open_image`.
    """
    try:
        image = _open_header(stream, formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} is not a readable {_either(formats)} picture: convert it or remove it."
        ) from None
    except Exception as err:  # broken headers raise whatever the decoder stumbled on
        raise _damaged(name, err) from err
    _check_size(image, name)
    _check_range(image, name)
    return _to_rgb(image, name)


def _check_range(image: Image.Image, name: str) -> None:
    """Refuse values of which nobody knows what is white: floats, and 32-bit integers of a TIFF."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise UserError(
            f"{name} holds floating-point or 32-bit values, whose brightest is unknown: convert it "
            "to 8 or 16 bits."
        )


def _either(formats: Sequence[str]) -> str:
    names = [name.replace("WEBP", "WebP") for name in formats]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image.seek(0)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey, also where Pillow holds it as 32 bit
            grey = np.asarray(upright, dtype=np.float64) / 257
            upright = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
        return upright.convert("RGB")
    except (
        Exception
    ) as err:  # damaged data raises OSError, SyntaxError, ValueError, zlib.error, ...
        raise _damaged(name, err) from err


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, f" ({image.width} x {image.height})")


def _too_large(name: str, size: str = "") -> UserError:
    return UserError(
        f"{name}{size} has more than {MAX_PIXELS // 1_000_000} million pixels: scale it down."
    )


def _damaged(name: str, err: Exception) -> UserError:
    return UserError(
        f"{name} is damaged or truncated ({str(err).strip() or type(err).__name__}): "
        "replace the file or remove it."
    )
