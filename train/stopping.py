"""Signals that ask a training to end: it ends after the step at hand, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """An interrupt (Ctrl-C) or SIGTERM (schedulers) that waits for the end of a step.

    Attributes:
        deferred: Whether one waits; else it ends the training where it is. A second one never
            waits.
        came: The signal that waits.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.came: int | None = None
        self.before: dict[int, Any] = {}

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.deferred and self.came is None:
            self.came = number
        else:
            self._act(number, frame)

    def obey(self) -> None:
        """Do now what a signal that has waited asks for."""
        if self.came is not None:
            number, self.came = self.came, None
            self._act(number, None)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal wait in the block, for `obey`."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        self.obey()

    def _act(self, number: int, frame: FrameType | None) -> None:
        """Do what the signal did before; a handler of the caller's may return, and so do we then."""
        handler = self.before[number]
        if callable(handler):
            handler(number, frame)
        else:
            raise SystemExit(128 + number)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yield what asks for an end in the block; the caller's handlers come back after it.

    Outside of the main thread Python gives no signals, and those that are ignored stay ignored.
    """
    request = StopRequest()
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in SIGNALS}
        request.before = {n: h for n, h in known.items() if h not in (None, signal.SIG_IGN)}
    for number in request.before:
        signal.signal(number, request.take)
    try:
        yield request
    finally:
        for number, handler in request.before.items():
            signal.signal(number, handler)
