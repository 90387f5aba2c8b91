"""Exact accounting of live tensor memory, for real tensors and for fake ones.

A dispatch mode sees every tensor that an operator returns and counts its storage until the
storage dies, whoever held it: Python, an autograd graph, a checkpoint, a custom walk. With fake
tensors the same code forecasts a step without computing it (`train/memory/forecast.py`). What an
operator allocates and frees inside itself is not seen; the running sum of
`torch.profiler(profile_memory=True)` agrees within 2 % (`tests/test_memory.py`).

The private names of torch that this needs live here and nowhere else: `UntypedStorage._cdata`,
`torch._subclasses.fake_tensor`, `torch.utils._pytree` and the operator `_local_scalar_dense`.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"  # the part of everything that has no other name

_current_part: ContextVar[str] = ContextVar("part", default=ACTIVATIONS)

Interval = tuple[int, int]  # [start, end) in bytes


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Count what is allocated in the block under `name` in `PeakBytes.parts`."""
    token = _current_part.set(name)
    try:
        yield
    finally:
        _current_part.reset(token)


@dataclass
class PeakBytes:
    """What one measured block needed, filled when the block ends.

    Attributes:
        start_bytes: Live bytes when the block began: the tensors that were named.
        peak_bytes: The most bytes that lived at once, those of the start included.
        end_bytes: Live bytes when the block ended.
        parts: Bytes by part at the moment of the peak; they sum to `peak_bytes`.
    """

    start_bytes: int = 0
    peak_bytes: int = 0
    end_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def measure_peak(*, device_type: str | None = None, **things: object) -> Iterator[PeakBytes]:
    """Measure the peak of live tensor bytes in the block.

    Args:
        device_type: Count on this kind of device only, e.g. "cuda"; None counts on all.
        things: What lives already, by part name, each anything `tensors_of` takes, e.g.
            `measure_peak(weights=model, optimizer_state=optimizer, batch=batch)`. A storage that
            is reached by two of them counts in the first.
    """
    result = PeakBytes()
    with LiveBytes(device_type) as live:
        for name, thing in things.items():
            live.track(thing, name=name)
        result.start_bytes = live.now
        yield result
    result.peak_bytes, result.end_bytes, result.parts = live.peak, live.now, live.peak_parts


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensor storages on one kind of device, or on all together.

    Storages that existed before and were not given to `track` are never counted, even when an
    operator returns a view of one.

    Attributes:
        now: Bytes alive now.
        peak: The most that were alive since the start.
        peak_parts: Bytes by part (see `part`) when `peak` was reached; parts of 0 bytes left out.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is untyped here
        self.device_type = device_type
        self.now = 0
        self.peak = 0
        self._by_part: dict[str, int] = {}
        self._at_peak: dict[str, int] = {}
        self._live: dict[int, _Entry] = {}

    @property
    def peak_parts(self) -> dict[str, int]:
        return {name: size for name, size in self._at_peak.items() if size}

    def track(self, *things: object, name: str = ACTIVATIONS) -> None:
        """Count tensors that exist already; see `tensors_of` for what may be given.

        Of a storage that several tensors share (tied weights, views of one memory-mapped file),
        the bytes that the given tensors cover count, once.
        """
        spans: dict[int, list[Interval]] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in filter(self._counts, tensors_of(*things)):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            spans.setdefault(storage._cdata, []).append(_span(tensor))
        for key, storage in storages.items():
            if key not in self._live:
                self._enter(storage, _covered(spans[key]), name)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in _arguments((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _arguments(out):
            self._see(tensor, given)
        return out

    def _counts(self, tensor: Tensor) -> bool:
        # asked of the tensor: the storage of a fake one always says "meta"
        return self.device_type is None or tensor.device.type == self.device_type

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        if not self._counts(tensor):
            return
        storage = tensor.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is None:
            if storage._cdata not in given:  # else it is older than this mode
                self._enter(storage, storage.nbytes(), _current_part.get())
        elif entry.whole and entry.size != storage.nbytes():  # resize_, set_, out=
            self._add(entry.name, storage.nbytes() - entry.size)
            entry.size = storage.nbytes()

    def _enter(self, storage: torch.UntypedStorage, size: int, name: str) -> None:
        key = storage._cdata
        # The Python object of a storage lives as long as the C++ one, so this reference dies
        # with the memory, also when only an autograd graph held it.
        reference = weakref.ref(storage, lambda _: self._leave(key))
        self._live[key] = _Entry(reference, name, size, whole=size == storage.nbytes())
        self._add(name, size)

    def _leave(self, key: int) -> None:
        entry = self._live.pop(key)
        self._add(entry.name, -entry.size)

    def _add(self, name: str, size: int) -> None:
        self.now += size
        self._by_part[name] = self._by_part.get(name, 0) + size
        if self.now > self.peak:
            self.peak = self.now
            self._at_peak = dict(self._by_part)


@dataclass
class _Entry:
    reference: weakref.ref[torch.UntypedStorage]
    name: str
    size: int
    whole: bool  # the size is the storage's own


def tensors_of(*things: object) -> Iterator[Tensor]:
    """Yield the tensors that things hold: their gradients too.

    Args:
        things: Tensors, modules (parameters and buffers), optimisers (their state), mappings and
            sequences of those; anything else (numbers, texts, None) holds no tensor.
    """
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad
        elif isinstance(thing, nn.Module):
            yield from tensors_of(*thing.parameters(), *thing.buffers())
        elif isinstance(thing, torch.optim.Optimizer):
            yield from tensors_of(*thing.state.values())
        elif isinstance(thing, Mapping):
            yield from tensors_of(*thing.values())
        elif isinstance(thing, Sequence) and not isinstance(thing, str | bytes):
            yield from tensors_of(*thing)


def _arguments(thing: object) -> list[Tensor]:
    """Return the tensors that an operator takes or returns."""
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor)]


def storage_bytes(*things: object) -> int:
    """Return the bytes of the tensors that things hold, shared storages once."""
    live = LiveBytes()
    live.track(*things)
    return live.now


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Give tensors shapes and types but neither memory nor values inside the block.

    Code that reads a number out of a tensor gets 1, and one that reads a truth value gets False:
    enough for optimisers that count their steps and initialisers that redraw until all is well.
    Real tensors (from numpy, say) may take part. The random state is put back at the end.

    Use it on "cpu" only: a fake CUDA tensor with autograd aborts a torch built without CUDA.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    numbers = _ReadNumbers()  # type: ignore[no-untyped-call]  # as above
    moves = patch.object(nn.Module, "to", _to)
    with torch.random.fork_rng(devices=[]), fake, numbers, moves:
        yield


_torch_to = nn.Module.to


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to` that leaves a module alone where nothing changes: torch cannot swap fake ones."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.to(*args, **kwargs) is tensor for tensor in tensors):
        return module
    return _torch_to(module, *args, **kwargs)


class _ReadNumbers(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def _span(tensor: Tensor) -> Interval:
    if tensor.numel() == 0:
        return 0, 0
    last = int(sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()


def _covered(spans: Iterable[Interval]) -> int:
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
