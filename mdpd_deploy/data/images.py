"""Opening pictures that strangers made: safe limits, one RGB frame, upright.

JPEG, PNG and WebP only; at most `MAX_PIXELS`, read from the header before anything is decoded
(a 20 kB PNG can decode to half a gigabyte); frame 0 of an animation; the EXIF rotation applied;
16-bit grey scaled to 8 bit, where Pillow's own conversion would clip it to white.
"""

import threading
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mdpd_deploy.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
MAX_PIXELS = 40_000_000

_header_lock = threading.Lock()  # catch_warnings is not thread-safe


def open_image(picture: Path | Image.Image) -> Image.Image:
    """Return a picture as upright RGB, fully decoded.

    Args:
        picture: A file, or a picture in memory (not modified).

    Raises:
        UserError: If the file is missing, no JPEG, PNG or WebP, damaged or truncated, or larger
            than `MAX_PIXELS`; the message names it.
    """
    if isinstance(picture, Image.Image):
        name = getattr(picture, "filename", "") or "the picture"
        _check_size(picture, str(name))
        return _to_rgb(picture, str(name))
    try:
        with picture.open("rb") as stream:
            return decode_image(stream, str(picture))
    except OSError as err:
        raise UserError(
            f"the picture {picture} cannot be opened ({err.strerror or err}): "
            "correct the path or the file's permissions."
        ) from err


def decode_image(stream: BinaryIO, name: str) -> Image.Image:
    """Return the picture in a stream as upright RGB; messages call it `name`.

    Raises:
        UserError: As `open_image`.
    """
    try:
        with _header_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} is not a readable JPEG, PNG or WebP picture: convert it or remove it."
        ) from None
    except Exception as err:  # broken headers raise whatever the decoder stumbled on
        raise _damaged(name, err) from err
    _check_size(image, name)
    return _to_rgb(image, name)


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
