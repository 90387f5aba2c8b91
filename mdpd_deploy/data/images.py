"""Opening pictures that strangers made: safe limits, one RGB frame, upright.

JPEG, PNG and WebP, and from files and data sets also TIFF, BMP and GIF; at most `MAX_PIXELS`, read
from the header before anything is decoded (a 20 kB PNG can decode to half a gigabyte), and
`MAX_SCANS`; frame 0 of an animation; the EXIF rotation applied; 16-bit grey scaled to 8 bit, where
Pillow's own conversion would clip it to white. Threads that decode at the same time share
`PIXELS_AT_ONCE`. Too little memory is no fault of the picture's and raises `WorkFailed`.
"""

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mdpd_deploy.errors import UserError, WorkFailed

FORMATS = ("JPEG", "PNG", "WEBP")  # of what is sent by strangers
FILE_FORMATS = (*FORMATS, "TIFF", "BMP", "GIF")  # of the user's own files
SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 40_000_000
MAX_SCANS = 100  # of a JPEG; encoders write about ten
PIXELS_AT_ONCE = 2 * MAX_PIXELS  # of the pictures that the threads of a process decode
BYTES_PER_PIXEL = 8  # the most that decoding holds: RGB, which Pillow keeps in four, twice

# A JPEG's marker ends the data of a scan; FF 00 is data, FF D0 to FF D7 restart within it.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA

_header_lock = threading.Lock()  # catch_warnings is not thread-safe
_share = threading.Condition()
_in_flight = 0  # pixels that are being decoded


class PictureTooLarge(UserError):
    """The picture would take more pixels, or scans, than are decoded here."""


def open_image(picture: Path | Image.Image) -> Image.Image:
    """Return a picture as upright RGB, fully decoded.

    Args:
        picture: A file, or a picture in memory (not modified).

    Raises:
        UserError: If the file is missing, of none of `FILE_FORMATS`, damaged or truncated, or
            larger than `MAX_PIXELS`; the message names it.
        WorkFailed: If the memory does not suffice.
    """
    if isinstance(picture, Image.Image):
        name = getattr(picture, "filename", "") or "the picture"
        _check_size(picture, str(name), MAX_PIXELS)
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


def decode_image(
    stream: BinaryIO,
    name: str,
    *,
    formats: Sequence[str] = FORMATS,
    most_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Return the picture in a stream as upright RGB; messages call it `name`.

    Args:
        stream: Can be read from its start again.
        name: As messages call it.
        most_pixels: Width times height, where less than `MAX_PIXELS` are wanted.

    Raises:
        UserError: As `open_image`; `PictureTooLarge` for too many pixels or scans.
        WorkFailed: As `open_image`.
    """
    most = min(most_pixels, MAX_PIXELS)
    try:
        image = _open_header(stream, formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(name, most) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} is not a readable {_either(formats)} picture: convert it or remove it."
        ) from None
    except MemoryError as err:
        raise _no_memory(name) from err
    except Exception as err:  # broken headers raise whatever the decoder stumbled on
        raise _damaged(name, err) from err
    _check_size(image, name, most)
    _check_range(image, name)
    if image.format in ("JPEG", "MPO"):
        _check_scans(stream, name)
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
        with _in_turn(image.width * image.height):
            image.seek(0)
            upright = image
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, also where Pillow holds it as 32 bit
                upright = upright.convert("I").point(_EIGHT_BITS, "L")
            upright.load()
            return upright if upright.mode == "RGB" else upright.convert("RGB")
    except Exception as err:  # damaged data raises OSError, SyntaxError, ValueError, zlib.error, …
        if isinstance(err, MemoryError) or not _has_room(image):
            raise _no_memory(name) from err
        raise _damaged(name, err) from err


_EIGHT_BITS = [(2 * grey + 257) // 514 for grey in range(1 << 16)]  # grey / 257, rounded


@contextlib.contextmanager
def _in_turn(pixels: int) -> Iterator[None]:
    """Wait until so many pixels fit beside those that other threads decode."""
    global _in_flight
    with _share:
        _share.wait_for(lambda: not _in_flight or _in_flight + pixels <= PIXELS_AT_ONCE)
        _in_flight += pixels
    try:
        yield
    finally:
        with _share:
            _in_flight -= pixels
            _share.notify_all()


def _has_room(image: Image.Image) -> bool:
    """Return whether the memory suffices: libjpeg calls data broken when it does not."""
    try:
        np.empty(BYTES_PER_PIXEL * image.width * image.height, np.uint8)
    except MemoryError:
        return False
    return True


def _check_size(image: Image.Image, name: str, most: int) -> None:
    if image.width * image.height > most:
        raise _too_large(name, most, f" ({image.width} x {image.height})")


def _check_scans(stream: BinaryIO, name: str) -> None:
    stream.seek(0)
    if count_scans(stream.read(), MAX_SCANS) > MAX_SCANS:
        raise PictureTooLarge(
            f"{name} is a JPEG of more than {MAX_SCANS} scans, which may take minutes to decode: "
            "save it again."
        )


def count_scans(jpeg: bytes, most: int) -> int:
    """Return the number of scans; of more than `most` only that there are, `most + 1`.

    Every scan walks over all blocks of the picture, though it may hold a few bytes only: 1.4 MB have
    room for 20,000, which take minutes. An encoder's progressive JPEG has about ten.
    """
    if jpeg.count(b"\xff\xda") <= most:  # can only be too many: other segments may hold these bytes
        return jpeg.count(b"\xff\xda")
    scans, at = 0, 0
    while scans <= most and (found := _MARKER.search(jpeg, at)):
        marker, at = found[1][0], found.end()
        if marker == _EOI:  # what follows is not the picture's: a second one, a video
            break
        scans += marker == _SOS
        if marker not in (_SOI, _TEM):
            at += max(
                int.from_bytes(jpeg[at : at + 2], "big"), 2
            )  # the segment, its length included
    return scans


def _too_large(name: str, most: int, size: str = "") -> UserError:
    return PictureTooLarge(
        f"{name}{size} has more than {most / 1e6:g} million pixels: scale it down."
    )


def _no_memory(name: str) -> WorkFailed:
    return WorkFailed(f"the memory does not suffice to decode {name}: free some, or scale it down.")


def _damaged(name: str, err: Exception) -> UserError:
    return UserError(
        f"{name} is damaged or truncated ({str(err).strip() or type(err).__name__}): "
        "replace the file or remove it."
    )
