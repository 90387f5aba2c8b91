"""The few CUDA calls that running an engine takes, by `cuda.bindings`. No torch here."""

import weakref
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from numpy.typing import NDArray

from mdpd_deploy.errors import UserError, WorkFailed, missing_extra
from mdpd_deploy.machine import gpu_driver


class CudaError(WorkFailed):
    """A CUDA call failed. Such an error can stay for the life of the process: start it again."""


@dataclass(frozen=True)
class Gpu:
    """The device that engines are built for and run on.

    Attributes:
        name: As the driver calls it.
        compute_capability: E.g. "9.0".
        driver: Version of the NVIDIA driver, "" where its tool is not installed.
        cuda: Version of CUDA that the driver supports, e.g. "13.0".
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str


def current_gpu() -> Gpu:
    """Return the CUDA device of this process.

    Raises:
        UserError: If cuda-bindings is not installed or there is no CUDA device.
    """
    cuda = _library()
    failed, count = cuda.cudaGetDeviceCount()
    if int(failed) or not count:
        raise UserError(
            f"no GPU can be used here ({_words(cuda, failed) if int(failed) else 'none is visible'}"
            "): TensorRT engines are built and run on the GPU that they are for."
        )
    device = _call(cuda.cudaGetDevice)
    properties = _call(cuda.cudaGetDeviceProperties, device)
    name = properties.name.decode() if isinstance(properties.name, bytes) else properties.name
    version = _call(cuda.cudaDriverGetVersion)  # 13020 = 13.2
    return Gpu(
        name=name.rstrip("\0"),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=gpu_driver(),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


class Stream:
    """A stream of its own: on the default one TensorRT synchronises the whole device.

    Attributes:
        handle: As an integer, which TensorRT takes.
    """

    def __init__(self) -> None:
        cuda = _library()
        self._stream = _call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        weakref.finalize(self, cuda.cudaStreamDestroy, self._stream)

    def synchronize(self) -> None:
        """Wait until everything that was put on the stream is done."""
        _call(_library().cudaStreamSynchronize, self._stream)

    def upload(self, array: NDArray[Any], memory: "DeviceMemory") -> None:
        """Copy a C-contiguous array to the device; keep it unchanged until `synchronize`."""
        cuda = _library()
        kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        _call(
            cuda.cudaMemcpyAsync,
            memory.address,
            array.ctypes.data,
            array.nbytes,
            kind,
            self._stream,
        )

    def download(self, memory: "DeviceMemory", array: NDArray[Any]) -> None:
        """Copy from the device into a C-contiguous array; it is there after `synchronize`."""
        cuda = _library()
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call(
            cuda.cudaMemcpyAsync,
            array.ctypes.data,
            memory.address,
            array.nbytes,
            kind,
            self._stream,
        )


class DeviceMemory:
    """A block of device memory, freed with the object.

    Attributes:
        bytes: Its size.
        address: Where it lies on the device.
    """

    def __init__(self, size: int) -> None:
        cuda = _library()
        self.bytes = max(size, 1)  # no address belongs to 0 bytes
        self.address = int(_call(cuda.cudaMalloc, self.bytes))
        weakref.finalize(self, cuda.cudaFree, self.address)


class StreamTimer:
    """Device time between two points of a stream."""

    def __init__(self, stream: Stream) -> None:
        cuda = _library()
        self._stream = stream
        self._start, self._end = _call(cuda.cudaEventCreate), _call(cuda.cudaEventCreate)
        for event in (self._start, self._end):
            weakref.finalize(self, cuda.cudaEventDestroy, event)

    def start(self) -> None:
        _call(_library().cudaEventRecord, self._start, self._stream._stream)

    def stop(self) -> None:
        _call(_library().cudaEventRecord, self._end, self._stream._stream)

    def elapsed_ms(self) -> float:
        """Return the time between `start` and `stop`; the stream must have been synchronised."""
        return float(_call(_library().cudaEventElapsedTime, self._start, self._end))


def _library() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as err:
        raise missing_extra("cuda-bindings", "trt", "running a TensorRT engine") from err


def _call(function: Any, *arguments: Any) -> Any:
    """Call CUDA; return its result, or raise `CudaError` with its own words."""
    failed, *results = function(*arguments)
    if int(failed):
        name = getattr(function, "__name__", "CUDA")
        raise CudaError(f"{name} failed on the GPU: {_words(_library(), failed)}.")
    return results[0] if results else None


def _words(cuda: Any, failed: Any) -> str:
    _, text = cuda.cudaGetErrorString(failed)
    return text.decode() if isinstance(text, bytes) else str(text)
