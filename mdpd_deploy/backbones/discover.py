"""What a model is made of, found by watching one forward: its blocks, its norms, its output.

A block is a module that is worth running again in the backward pass: large enough to hold most of
a stage's activations, small enough to be the peak. transformers marks its blocks itself; elsewhere
a module whose children run as one chain (a stage) is taken apart, and one whose children do not
(a residual block) is a block. Any choice gives exact gradients; it only decides the memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

STEMS = ("stem", "patch_embed", "embeddings")
NOT_TUNED = ("q_norm", "k_norm", "attn.norm", "mlp.norm", "GlobalResponseNorm")
Version = tuple[int, int]  # which memory, and how often it was written to


@dataclass(frozen=True)
class Parts:
    """What was found.

    Attributes:
        blocks: Modules to run again, by name, in the order in which they run.
        norms: Names of the tuned norms: those of the blocks and those that run behind the first
            block; not those of queries and keys, not the embedding's, and none that the output
            does not read.
        last_norms: Those of `norms` that lie in no block.
    """

    blocks: dict[str, nn.Module]
    norms: tuple[str, ...]
    last_norms: tuple[str, ...]


@dataclass
class _Seen:
    """One module's first call.

    Attributes:
        order: When it began.
        takes: Memory of its tensor arguments.
        gives: Memory of what it returned.
        children: Names of the modules called within, in order.
    """

    order: int
    takes: set[Version] = field(default_factory=set)
    gives: set[Version] = field(default_factory=set)
    children: list[str] = field(default_factory=list)


def discover(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Parts, Tensor]:
    """Watch one forward and name the parts; return them with its output.

    Args:
        model: In the mode in which it will run.
        forward: Calls the model on an example, real or fake.
    """
    seen, output = _watch(model, forward)
    marked = [name for name in seen if _marked(model.get_submodule(name))]
    found = _outermost(marked) if marked else _taken_apart(model, seen)
    found.sort(key=lambda name: seen[name].order)
    first = seen[found[0]].order if found else 0
    read = _read_by(output)
    norms = tuple(
        name
        for name, entry in seen.items()
        if is_tuned(name, model.get_submodule(name))
        and entry.order >= first
        and id(model.get_submodule(name).weight) in read
    )
    inside = tuple(f"{name}." for name in found)
    last = tuple(name for name in norms if not name.startswith(inside))
    parts = Parts({name: model.get_submodule(name) for name in found}, norms, last)
    return parts, output.detach()


def _read_by(output: Tensor) -> set[int]:
    """Return the identities of the parameters that an output depends on."""
    found: set[int] = set()
    queue, met = [output.grad_fn], {output.grad_fn}
    while queue:
        node: Any = queue.pop()
        if node is None:
            continue
        found.add(id(getattr(node, "variable", None)))
        following = {after for after, _ in node.next_functions} - met
        met |= following
        queue += following
    return found


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm with a scale, whichever library it comes from."""
    weight = module._parameters.get("weight")
    return "Norm" in type(module).__name__ and weight is not None and weight.ndim == 1


def is_tuned(name: str, module: nn.Module) -> bool:
    """Tell whether a module is a norm that methods tune."""
    if not is_norm(module) or type(module).__name__ in NOT_TUNED:
        return False
    return not f".{name}".endswith(tuple(f".{ending}" for ending in NOT_TUNED))


def _marked(module: nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def _outermost(names: list[str]) -> list[str]:
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


def _taken_apart(model: nn.Module, seen: dict[str, _Seen]) -> list[str]:
    """Return the blocks of a model without marks; what runs before the first one is its stem."""
    parts = {c: _blocks(c, model, seen) for c in seen[""].children if not c.startswith(STEMS)}
    found: list[str] = []
    for child, blocks in parts.items():
        listed = any(part.isdigit() for part in child.split("."))
        if found or listed or blocks not in ([], [child]):
            found += blocks
    return found or [block for blocks in parts.values() for block in blocks]


def _blocks(name: str, model: nn.Module, seen: dict[str, _Seen]) -> list[str]:
    """Return the blocks of a module: those of its links if it is a chain of any, or itself."""
    module = model.get_submodule(name)
    links = seen[name].children
    if not links or is_norm(module) or not any(True for _ in module.parameters()):
        return []
    inner = [block for link in links for block in _blocks(link, model, seen)]
    large = [link for link in links if seen[link].children]
    if _is_chain(large, seen) and any(_adds(block, seen) for block in inner):
        return inner
    return [name]


def _is_chain(links: list[str], seen: dict[str, _Seen]) -> bool:
    """Tell whether each of the modules reads what the one before it gave, unchanged."""
    return all(seen[after].takes & seen[before].gives for before, after in pairwise(links))


def _adds(name: str, seen: dict[str, _Seen]) -> bool:
    """Tell whether a module is more than a chain of others: it adds, or joins branches."""
    links = seen[name].children
    return not (_is_chain(links, seen) and seen[links[-1]].gives & seen[name].gives)


def _watch(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[dict[str, _Seen], Tensor]:
    """Run a forward whose graph knows the norms and keeps no tensor."""
    seen: dict[str, _Seen] = {}
    stack: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    kept: list[Tensor] = []  # memory that lives on is not given to another tensor

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        name = names[module]
        if name not in seen:
            tensors = list(_tensors((args, kwargs)))
            kept.extend(tensors)
            seen[name] = _Seen(len(seen), takes={_version(t) for t in tensors})
            if stack:
                seen[stack[-1]].children.append(name)
        stack.append(name)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        tensors = list(_tensors(out))
        kept.extend(tensors)
        seen[stack.pop()].gives |= {_version(t) for t in tensors}

    hooks: list[RemovableHandle] = []
    norms = [module for name, module in model.named_modules() if is_tuned(name, module)]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for norm in norms:
            for parameter in norm.parameters(recurse=False):
                parameter.requires_grad_(True)
        for module in names:
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            output = forward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in frozen:
            parameter.requires_grad_(before)
    seen.setdefault("", _Seen(0, children=[n for n in seen if not _inside(n, seen)]))
    return seen, output


def _inside(name: str, seen: dict[str, _Seen]) -> bool:
    return any(name in entry.children for entry in seen.values())


def _version(tensor: Tensor) -> Version:
    return tensor.untyped_storage()._cdata, tensor._version


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _tensors(value)
