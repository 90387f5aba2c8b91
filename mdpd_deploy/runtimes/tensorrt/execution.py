"""One execution context of an engine with its own memory on the device.

An engine is shared; a context belongs to one thread at a time. Tensors go by name, never by
position.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.errors import WorkFailed
from mdpd_deploy.runtimes.tensorrt.cuda import DeviceMemory, Stream
from mdpd_deploy.runtimes.tensorrt.library import said

Shape = tuple[int, ...]


class Execution:
    """Loads one batch, runs it any number of times, and fetches the outputs.

    Args:
        engine: A deserialised engine.
        logger: Its recording logger.
        outputs: Name and dtype of every output.

    Raises:
        WorkFailed: If the device has no memory for a context.
    """

    def __init__(self, engine: Any, logger: Any, outputs: Mapping[str, np.dtype[Any]]) -> None:
        self.stream = Stream()
        self._logger = logger
        self._outputs = dict(outputs)
        self._memory: dict[str, DeviceMemory] = {}
        self._shapes: dict[str, Shape] = {}
        context = engine.create_execution_context()
        if context is None:
            raise WorkFailed(
                f"TensorRT could not make room to run the engine: {said(logger.errors)}."
            )
        self._context = context

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy inputs to the device and make room for the outputs of their shapes.

        Args:
            arrays: Every input, C-contiguous, in the engine's dtypes and within its profile.
        """
        context = self._context
        for name, array in arrays.items():
            self._check(context.set_input_shape(name, array.shape), f"the shape of {name}")
            memory = self._room(name, array.nbytes)
            self.stream.upload(array, memory)
            self._check(context.set_tensor_address(name, memory.address), f"memory for {name}")
        unknown = context.infer_shapes()
        if unknown:
            raise WorkFailed(f"TensorRT cannot tell the shape of {', '.join(unknown)}.")
        for name, dtype in self._outputs.items():
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            memory = self._room(name, int(np.prod(shape)) * dtype.itemsize)
            self._shapes[name] = shape
            self._check(context.set_tensor_address(name, memory.address), f"memory for {name}")
        self.stream.synchronize()  # the caller may now change its arrays

    def enqueue(self) -> None:
        """Put one run on the stream."""
        context = self._context
        self._check(context.execute_async_v3(self.stream.handle), "the run")

    def run(self) -> None:
        """Run the loaded batch and wait for it."""
        self.enqueue()
        self.stream.synchronize()

    def fetch(self) -> dict[str, NDArray[Any]]:
        """Return the outputs of the last run by name."""
        found = {}
        for name, dtype in self._outputs.items():
            found[name] = np.empty(self._shapes[name], dtype=dtype)
            self.stream.download(self._memory[name], found[name])
        self.stream.synchronize()
        return found

    def _room(self, name: str, size: int) -> DeviceMemory:
        """Return memory of at least `size` bytes that stays with the tensor."""
        held = self._memory.get(name)
        if held is None or held.bytes < size:
            held = self._memory[name] = DeviceMemory(size)
        return held

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise WorkFailed(f"TensorRT refused {what}: {said(self._logger.errors)}.")
