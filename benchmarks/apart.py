"""Work in a process of its own, so that neither memory nor a failure is left behind.

Each process is forked from a server that has imported the libraries and used no device: it starts
in a moment, with a fresh allocator and without a CUDA context.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = [
    "mdpd_deploy.serve.latency.benchmark",
    "mdpd_deploy.train",
    "peft",
    "timm",
    "transformers",
]


class Failed(Exception):
    """The work ended without a result; the message is the reason, in a line."""


def run_apart(work: Callable[..., Any], *args: object, limit_s: float) -> Any:
    """Return `work(*args)` of a fresh process.

    Args:
        work: A function of a module; arguments and result must be picklable.
        args: Its arguments.
        limit_s: Seconds after which the process is ended.

    Raises:
        Failed: If it raised, died, or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(there, work, args), daemon=True)
    child.start()
    there.close()
    try:
        if not here.poll(limit_s):
            raise Failed(f"took longer than {limit_s:.0f} s")
        result, reason = here.recv()
    except EOFError:
        child.join()
        raise Failed(f"its process ended with exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if reason is not None:
        raise Failed(reason)
    return result


def reason_of(err: BaseException) -> str:
    """Return an exception as one line: its kind and the first line of its message."""
    message = str(err).strip().splitlines()
    return f"{type(err).__name__}: {message[0]}" if message else type(err).__name__


def _send(there: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        there.send((work(*args), None))
    except Exception as err:  # noqa: BLE001 - every exception becomes a reason
        traceback.print_exc()
        there.send((None, reason_of(err)))
