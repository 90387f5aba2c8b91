"""Our work under torch's own defaults, whatever the caller has set; the caller's come back.

A notebook may have turned gradients off, chosen another type or device for new tensors, or stand in
an autocast or inference block. None of it is ours to work under, and the state of the random
generators is not ours to move.
"""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Give the block gradients, float32 tensors on the CPU and random generators of its own.

    Where torch is not loaded nobody has set anything, and it stays unloaded.
    """
    if "torch" not in sys.modules:
        yield
        return
    import torch

    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
