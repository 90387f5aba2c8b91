"""What is made when it is first asked for and then kept, in each process anew."""

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OncePerProcess(Generic[T]):
    """Keeps one thing for all threads of a process.

    A session of ONNX Runtime has threads of its own, which a fork does not take along: a child that
    used its parent's would wait for ever, so it makes one. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Place[T]] = {}  # a parent's stays: it cannot be closed from here

    def get(self, make: Callable[[], T]) -> T:
        """Return the thing; threads that ask while it is being made wait for it."""
        place = self._kept.setdefault(os.getpid(), _Place())
        with place.lock:
            if not place.things:
                place.things.append(make())
            return place.things[0]

    def __reduce__(self) -> tuple[type["OncePerProcess[T]"], tuple[()]]:
        return type(self), ()


class _Place(Generic[T]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.things: list[T] = []
