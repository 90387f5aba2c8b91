"""Building models of foreign libraries: without weights, quietly, and with errors in our words."""

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mdpd_deploy.errors import UserError
from mdpd_deploy.hub import quiet

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LOUD = ("timm", "transformers", "huggingface_hub")

_FOREIGN = (  # what the loaders raise for bad names, files and shapes
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    EOFError,
    ImportError,
    SafetensorError,
    UnpicklingError,
    BadZipFile,
    zlib.error,
)


def skeleton(build: Callable[[], ModuleT]) -> ModuleT:
    """Build a module whose parameters hold no values: nothing is initialised or touched.

    The module is built in a thread of its own because torch's modes are per thread: under
    FakeTensorMode the libraries' constructors fail (timm reads numbers out of a tensor). The
    parameters are then made empty in the caller's thread, so that they are fake under
    FakeTensorMode and real, uninitialised memory otherwise. Buffers keep their values unless
    tensors are fake.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        module = thread.submit(_build_on_meta, build).result()
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            empty = torch.empty(buffer.shape, dtype=buffer.dtype)
            if type(empty) is not Tensor:
                setattr(part, name, empty)
    return module


def _build_on_meta(build: Callable[[], ModuleT]) -> ModuleT:
    """Build without weights; with them where the library computes from them or where they lie."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            module = build()
    except Exception:  # noqa: BLE001  # what is truly wrong is raised again below
        return build()
    kept = [*module.buffers(), *(v for part in module.modules() for v in vars(part).values())]
    return build() if any(isinstance(v, Tensor) and v.is_meta for v in kept) else module


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep timm, transformers and the hub client from writing to stderr inside the block."""
    with quiet(*_LOUD), _no_bars():
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub import utils

    hub: Any = utils  # its bar switches are public but not marked as exported
    library = sys.modules.get("transformers.utils.logging")  # not loaded for its bar alone
    hub_was_on = not hub.are_progress_bars_disabled()
    library_was_on = library is not None and library.is_progress_bar_enabled()
    hub.disable_progress_bars()
    if library is not None:
        library.disable_progress_bar()
    try:
        yield
    finally:
        if hub_was_on:
            hub.enable_progress_bars()
        if library is not None and library_was_on:
            library.enable_progress_bar()


@contextlib.contextmanager
def explaining(what: str, mend: str) -> Iterator[None]:
    """Turn what a library raises into one sentence: what failed, its first line, the mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as err:
        if not isinstance(err, _FOREIGN) and not type(err).__module__.startswith("httpx"):
            raise
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(err).__name__).rstrip(".")
        raise UserError(f"{what}: {reason[:300]}. {mend}") from err
