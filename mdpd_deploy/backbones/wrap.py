"""Blocks of a library's model, wrapped in place while its own forward runs.

The library's forward does everything around the blocks: embeddings, masks, position biases, what
lies between stages. While a trace is taken, each named block's `forward` is replaced by one that

1. remembers what the block was called with besides its state (masks, biases): its call;
2. runs it, with whatever graph `run` keeps;
3. records the state that goes in and what comes out: the taps b_0..b_L.

Afterwards the blocks are as they were, so that neither copies of the model nor exported graphs
meet a wrapper. Shapes: the state x is the block's first argument, e.g. [B, N, D].
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.utils.checkpoint import checkpoint

from mdpd_deploy.backbones.layout import Layout

Forward = Callable[..., Any]
Run = Callable[[int, Forward, "Call"], Any]  # (block index, the block's own forward, its call)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block.

    Attributes:
        x: The state that the block changes.
        args: Positional arguments behind it.
        kwargs: Keyword arguments; the state is among them under `named`, if it was given so.
        named: Name of the state where it was passed by keyword.
    """

    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    named: str | None = None

    def of(self, function: Forward, x: Tensor) -> Any:
        """Call `function` with this call's arguments and another state."""
        return self.on(function)(x, *self.args)

    def on(self, function: Forward) -> Forward:
        """Return `function` of the state and of `args`; it holds neither of them."""
        kwargs, named = self.kwargs, self.named

        def bound(x: Tensor, *args: Any) -> Any:
            x = _own(x)
            if named is not None:
                return function(*args, **{named: x}, **kwargs)
            return function(x, *args, **kwargs)

        return bound

    def replaced(self, forward: Forward, **values: Any) -> "Call":
        """Return this call with arguments of `forward` replaced by name."""
        names = list(inspect.signature(forward).parameters)[1:]
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in values.items():
            place = names.index(name) if name in names else len(args)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return replace(self, args=tuple(args), kwargs=kwargs)


@dataclass
class Trace:
    """One forward of a backbone.

    Attributes:
        mask: Token mask [B, N], 1 = real token; None when nothing is padded.
        taps: b_0..b_l [B, N, D] as far as the forward ran, detached; empty where none are kept.
        calls: What every block was called with, those beyond `taps` included; states are detached
            and in the library's form.
        ends: b_1..b_l [B, N, D] with their graphs; b_l alone where no taps are kept.
    """

    mask: Tensor | None
    taps: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)

    def drop(self) -> None:
        """Let go of every state but what graphs keep.

        A list of taps that lives through the backward pass would keep the deep activations while
        the early, large ones are made again.
        """
        self.taps.clear()
        self.calls.clear()
        self.ends.clear()


def plainly(index: int, forward: Forward, call: Call) -> Any:
    """Run a block and keep what autograd keeps."""
    return call.of(forward, call.x)


def recomputed(index: int, forward: Forward, call: Call) -> Any:
    """Run a block and keep its input only; the backward pass runs it again, dropout replayed."""
    return checkpoint(call.on(forward), call.x, *call.args, use_reentrant=False)


def recomputed_halves(halves: Sequence[Sequence[nn.Module]]) -> Run:
    """Return a way as `recomputed` that, when a block runs again, keeps one half of it at a time.

    Args:
        halves: Parts of each block, in the order in which they run. The last one's gradient is
            wanted at once, so only those before it are run a third time.
    """

    def run(index: int, forward: Forward, call: Call) -> Any:
        def block(x: Tensor, *args: Any) -> Any:
            with wrapped(halves[index][:-1], recomputed):
                return call.on(forward)(x, *args)

        return checkpoint(block, call.x, *call.args, use_reentrant=False)

    return run


def halves_of(block: nn.Module) -> list[nn.Module]:
    """Return the parts of a block that have maps of their own, such as attention and MLP."""
    return [
        child
        for child in block.children()
        if any(True for _ in child.children()) and any(p.ndim > 1 for p in child.parameters())
    ]


def apart(index: int, forward: Forward, call: Call) -> Any:
    """As `recomputed`, but no gradient passes from a block to the one below it."""
    return recomputed(index, forward, replace(call, x=call.x.detach()))


class _ReachedError(Exception):
    """The last block was reached: what the library does behind it is left out."""


def record(
    trace: Trace,
    blocks: Sequence[nn.Module],
    last: int,
    run: Run,
    forward: Forward,
    *,
    keep_taps: bool,
    layouts: Sequence[Layout],
    merges: Mapping[int, nn.Module],
) -> None:
    """Call `forward`, which runs `blocks` in order, and leave b_0..b_last in `trace`.

    Args:
        trace: Filled.
        blocks: The modules; each maps a state to the next one.
        last: How many of them run, at least 1.
        run: How each is run.
        forward: The library's own forward without arguments. Blocks from `last` on are entered, for
            the sake of their calls, and not run.
        keep_taps: Keep b_0..b_last and the calls, not only b_last.
        layouts: Of b_0..b_L.
        merges: Modules that run before a block, by its index; run as it is.
    """

    def recorded(index: int, plain: Forward, call: Call) -> Any:
        if keep_taps:
            trace.calls.append(replace(call, x=call.x.detach()))
            trace.taps += [layouts[0].tokens(call.x.detach())] if index == 0 else []
        out: Any = call.x
        if index < last:
            # a merge has cut the graph already, where it is to be cut
            out = (recomputed if run is apart and index in merges else run)(index, plain, call)
            end = layouts[index + 1].tokens(first_of(out))
            if keep_taps:
                trace.taps.append(end.detach())
            if keep_taps or index == last - 1:
                trace.ends.append(end)
        # torch.export loses its place where an exception leaves a module, and has to start again
        if index == len(blocks) - 1 and (last < len(blocks) or not is_exporting()):
            raise _ReachedError
        return out

    def merged(place: int, plain: Forward, call: Call) -> Any:
        index = before[place]
        return run(index, plain, call) if index < last else call.x

    before = list(merges)
    with (
        wrapped(blocks, recorded),
        wrapped(list(merges.values()), merged),
        contextlib.suppress(_ReachedError),
    ):
        forward()


@contextlib.contextmanager
def wrapped(blocks: Sequence[nn.Module], run: Run) -> Iterator[None]:
    """Let blocks be run by `run` inside the block of code."""
    own = [block.__dict__.get("forward") for block in blocks]  # few have one beside their class's
    for index, block in enumerate(blocks):
        block.__dict__["forward"] = _wrapper(index, block.forward, run)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def _wrapper(index: int, plain: Forward, run: Run) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(index, plain, _call(plain, args, kwargs))

    return forward


def _call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a block's call without a cache of keys and values, which running it twice fills twice."""
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    if args:
        return Call(_own(args[0]), args[1:], kwargs)
    name = next(iter(inspect.signature(forward).parameters))
    rest = {key: value for key, value in kwargs.items() if key != name}
    return Call(_own(kwargs[name]), (), rest, name)


def _own(state: Any) -> Any:
    """Return a state that nobody else changes: a list of maps may grow behind its block, or in it."""
    return [*state] if isinstance(state, list) else state


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")


def first_of(out: Any) -> Tensor:
    """Return the state from what a block returns: itself, or the first of a tuple."""
    state: Tensor = out[0] if isinstance(out, tuple) else out
    return state
