"""A child process that decodes pictures and tokenises long texts, so that it can be killed.

What a stranger sends may keep a decoder busy for long, take much memory, or hit a fault of it: that
ends here and not in the server. `preparing` starts it and speaks to it over pipes.
"""

import contextlib
import os
import pickle
import signal
import struct
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from safetensors.numpy import save

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.images import PictureTooLarge, decode_image
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.errors import UserError, WorkFailed

HEADER = struct.Struct(">BQ")  # kind of a message, and how many bytes follow
READY, JOB, ARRAYS, INVALID, TOO_LARGE, NO_MEMORY = range(6)
TEXT_MEMORY = 500_000_000  # bytes that tokenising may take; 1 MB of marks takes half of it
PIXEL_MEMORY = 20  # bytes that a pixel may take, with a progressive JPEG's coefficients


@dataclass(frozen=True)
class Job:
    """What is to be prepared.

    It is pickled by the parent, for its own child; what comes back is not.

    Attributes:
        preprocess: None = that of the job before.
        inputs: Texts or pairs, or the bytes of a picture file.
        most_pixels: Of a picture.
    """

    preprocess: Preprocess | None
    inputs: Sequence[Raw] | bytes
    most_pixels: int


def main() -> None:
    """Answer jobs until the parent closes the pipe, or has died."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when this ends
    warnings.simplefilter("ignore")
    outward = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    _limit_memory(TEXT_MEMORY + PIXEL_MEMORY * int(sys.argv[1]))
    _write(outward, READY, b"")
    preprocess: Preprocess | None = None
    while (message := _read(sys.stdin.buffer)) is not None:
        job: Job = pickle.loads(message)
        preprocess = job.preprocess or preprocess
        assert preprocess is not None
        _write(outward, *_answer(job, preprocess))


def _answer(job: Job, preprocess: Preprocess) -> tuple[int, bytes]:
    try:
        if not isinstance(job.inputs, bytes):
            return ARRAYS, save(preprocess(job.inputs))
        picture = decode_image(BytesIO(job.inputs), "the picture", most_pixels=job.most_pixels)
        return ARRAYS, save(preprocess([picture]))
    except PictureTooLarge as err:
        return TOO_LARGE, str(err).encode()
    except UserError as err:
        return INVALID, str(err).encode()
    except (WorkFailed, MemoryError):
        return NO_MEMORY, b""


def _limit_memory(more: int) -> None:
    """Let this process have so many bytes beside what it has, where the system can limit that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        import psutil

        most = psutil.Process().memory_info().vms + more
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _read(stream: BinaryIO) -> bytes | None:
    header = stream.read(HEADER.size)
    return stream.read(HEADER.unpack(header)[1]) if len(header) == HEADER.size else None


def _write(stream: BinaryIO, kind: int, content: bytes) -> None:
    stream.write(HEADER.pack(kind, len(content)) + content)
    stream.flush()
