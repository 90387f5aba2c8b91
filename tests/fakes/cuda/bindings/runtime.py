"""Stands in for `cuda.bindings.runtime` where there is no GPU: memory and streams on the host.

Work that is put on a stream is done when the stream is synchronised and not before, and a device
address is not a host address, so a copy in the wrong direction or a missing wait gives an error or
wrong numbers here too. Names are those of the real module (tests/test_trt_names.py).
"""

import ctypes as _ctypes
import enum as _enum
import itertools as _itertools
import types as _types

import numpy as _np

_faults: dict = {}
_gpu = {"name": b"Stand-in GPU", "major": 9, "minor": 0, "count": 1, "cuda": 13020}
_device: dict[int, _np.ndarray] = {}
_queues: dict[int, list] = {}
_numbers = _itertools.count(1)
_BASE = 0x7F00_0000_0000


class cudaError_t(_enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700


class cudaMemcpyKind(_enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStream_t(int):
    pass


cudaStreamNonBlocking = 1
_OK = cudaError_t.cudaSuccess


def _failing(name):
    return _faults.get(name)


def cudaGetDeviceCount():
    failed = _failing("cudaGetDeviceCount")
    return (failed, None) if failed else (_OK, _gpu["count"])


def cudaGetDevice():
    return _OK, 0


def cudaGetDeviceProperties(device):
    return _OK, _types.SimpleNamespace(**{k: _gpu[k] for k in ("name", "major", "minor")})


def cudaDriverGetVersion():
    return _OK, _gpu["cuda"]


def cudaGetErrorString(error):
    return _OK, cudaError_t(error).name.encode()


def cudaStreamCreateWithFlags(flags):
    assert flags == cudaStreamNonBlocking
    stream = cudaStream_t(next(_numbers))
    _queues[int(stream)] = []
    return _OK, stream


def cudaStreamDestroy(stream):
    _queues.pop(int(stream), None)
    return (_OK,)


def cudaStreamSynchronize(stream):
    failed = _failing("cudaStreamSynchronize")
    if failed:
        return (failed,)
    queue = _queues[int(stream)]
    while queue:
        queue.pop(0)()
    return (_OK,)


def cudaMalloc(size):
    if _failing("cudaMalloc") or size == 0:
        return cudaError_t.cudaErrorMemoryAllocation, None
    address = _BASE + (next(_numbers) << 32)
    _device[address] = _np.full(size, 0xAB, dtype=_np.uint8)
    return _OK, address


def cudaFree(address):
    _device.pop(address, None)
    return (_OK,)


def cudaMemcpyAsync(target, source, size, kind, stream):
    upload = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
    on_device, on_host = (target, source) if upload else (source, target)
    if on_device not in _device or on_host in _device or size > len(_device[on_device]):
        return (cudaError_t.cudaErrorInvalidValue,)

    def copy():
        memory = _device[on_device]
        if upload:
            _ctypes.memmove(memory.ctypes.data, on_host, size)
        else:
            _ctypes.memmove(on_host, memory.ctypes.data, size)

    _queues[int(stream)].append(copy)
    return (_OK,)


def cudaEventCreate():
    return _OK, next(_numbers)


def cudaEventDestroy(event):
    return (_OK,)


def cudaEventRecord(event, stream):
    return (_OK,)


def cudaEventElapsedTime(start, end):
    return _OK, 0.25
