"""Stands in for TensorRT where there is no GPU: the same names and rules, run by ONNX Runtime.

Every class and member here exists in the real bindings of the release that `_version` names
(tests/trt_names.json); an attribute that the real class lacks cannot be read or set. What a method
answers follows NVIDIA's documentation: failures are None, False or -1 with a line in the logger,
never an exception. `_faults` makes one step fail.
"""

import enum as _enum
import json as _json
import os as _os
from pathlib import Path as _Path

import numpy as _np
import onnx as _onnx
from cuda.bindings import runtime as _cuda

_names_file = _Path(__file__).parents[2] / "trt_names.json"
__version__ = _os.environ.get("MDPD_FAKE_TRT", "11.4.0.106")
_NAMES = _json.loads(_names_file.read_text())[__version__]
_faults: dict = _json.loads(_os.environ.get("MDPD_FAKE_TRT_FAULTS", "{}"))
_REFUSED = {"DynamicQuantizeLinear", "MatMulInteger"}


class _Faithful:
    """Refuses members that the real class of the same name does not have."""

    def __init_subclass__(cls):
        if cls.__module__ == __name__:
            strange = {n for n in vars(cls) if n[0] != "_"} - set(_NAMES[cls.__name__])
            assert not strange, f"the real {cls.__name__} of {__version__} has no {strange}"

    def __setattr__(self, name, value):
        cls = type(self)
        if cls.__module__ == __name__ and name[0] != "_" and name not in _NAMES[cls.__name__]:
            raise AttributeError(f"{cls.__name__} has no attribute {name}")
        object.__setattr__(self, name, value)


def _enumeration(name):
    members = [n for n in _NAMES[name] if n not in ("name", "value", "itemsize")]
    return _enum.IntEnum(name, {member: index for index, member in enumerate(members)})


BuilderFlag = _enumeration("BuilderFlag")
DataType = _enumeration("DataType")
ErrorCode = _enumeration("ErrorCode")
HardwareCompatibilityLevel = _enumeration("HardwareCompatibilityLevel")
LayerInformationFormat = _enumeration("LayerInformationFormat")
MemoryPoolType = _enumeration("MemoryPoolType")
NetworkDefinitionCreationFlag = _enumeration("NetworkDefinitionCreationFlag")
ProfilingVerbosity = _enumeration("ProfilingVerbosity")
TensorIOMode = _enumeration("TensorIOMode")
_KINDS = {
    _onnx.TensorProto.FLOAT: (DataType.FLOAT, _np.float32),
    _onnx.TensorProto.INT64: (DataType.INT64, _np.int64),
}


class ILogger(_Faithful):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self):
        self._ready = True


def _say(logger, message, severity=ILogger.ERROR):
    logger.log(severity, message)


class ITensor(_Faithful):
    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class Weights(_Faithful):
    def __init__(self, array):
        self._array, self._size, self._dtype = array, array.size, array.dtype

    @property
    def size(self):
        return self._size


class IHostMemory(bytes):
    @property
    def nbytes(self):
        return len(self)


class Builder(_Faithful):
    def __init__(self, logger):
        if not getattr(logger, "_ready", False):
            raise TypeError("ILogger.__init__ was not called")
        self._logger = logger

    def create_network(self, flags=0):
        typed = bool(flags >> int(NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1)
        assert typed or __version__.startswith("11"), "a weakly typed network"
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if "build" in _faults:
            return _say(self._logger, _faults["build"])
        profile = config._profiles[0]._shapes if config._profiles else {}
        for tensor in network._inputs:
            if -1 in tensor.shape and tensor.name not in profile:
                return _say(self._logger, f"no profile for {tensor.name}")
        if config._workspace is not None and config._workspace < 2 << 20:
            return _say(self._logger, "OutOfMemory: 2097152 bytes of workspace are needed")
        header = {
            "version": __version__,
            "profile": profile,
            "refit": sorted(network._marked)
            if BuilderFlag.REFIT_INDIVIDUAL in config._flags
            else [],
            "compatible": BuilderFlag.VERSION_COMPATIBLE in config._flags,
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
        }
        config._cache._timings = b"timings of " + _cuda._gpu["name"]
        plain = _json.dumps(header).encode()
        return IHostMemory(plain + b"\0" + network._proto.SerializeToString())


class INetworkDefinition(_Faithful):
    def __init__(self):
        self._inputs, self._proto, self._marked = [], None, set()

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, index):
        return self._inputs[index]

    def mark_weights_refittable(self, name):
        known = name in {tensor.name for tensor in self._proto.graph.initializer}
        if known:
            self._marked.add(name)
        return known


class ParserError(_Faithful):
    def __init__(self, operator, node, description, code=None, stack=()):
        self._found = (operator, node, description, code or "UNSUPPORTED_NODE", list(stack))

    def node_operator(self):
        return self._found[0]

    def node_name(self):
        return self._found[1]

    def desc(self):
        return self._found[2]

    def code(self):
        return ErrorCode[self._found[3]]

    def local_function_stack(self):
        return self._found[4]


class OnnxParser(_Faithful):
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def parse_from_file(self, path):
        proto = _onnx.load(path)  # external weights come from beside the file
        found = [(n.op_type, n.name) for n in proto.graph.node if n.op_type in _REFUSED]
        self._errors = [ParserError(op, node, "No importer registered.") for op, node in found]
        self._errors += [ParserError(*error) for error in _faults.get("parse", ())]
        if self._errors:
            return False
        for value in proto.graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)
            self._network._inputs.append(ITensor(value.name, shape))
        self._network._proto = proto
        return True


class IOptimizationProfile(_Faithful):
    def __init__(self):
        self._shapes, self._valid = {}, True

    def set_shape(self, input, min, opt, max):
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            self._valid = False  # and not a word
        self._shapes[input] = [list(min), list(opt), list(max)]

    def __bool__(self):
        return self._valid and "profile" not in _faults


class ITimingCache(_Faithful):
    def __init__(self, timings):
        self._timings = timings

    def serialize(self):
        return IHostMemory(self._timings)


class IBuilderConfig(_Faithful):
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY

    def __init__(self, logger):
        self._logger, self._flags, self._profiles = logger, {BuilderFlag.TF32}, []
        self._workspace, self._cache = None, None

    def set_flag(self, flag):
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool, limit):
        if "pool" not in _faults:
            self._workspace = limit

    def get_memory_pool_limit(self, pool):
        return self._workspace

    def create_timing_cache(self, timings):
        return ITimingCache(bytes(timings))

    def set_timing_cache(self, cache, ignore_mismatch):
        foreign = cache._timings and _cuda._gpu["name"] not in cache._timings
        if foreign and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def add_optimization_profile(self, profile):
        if "add_profile" in _faults:
            _say(self._logger, "the profile is not valid")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Runtime(_Faithful):
    engine_host_code_allowed = False

    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        header, separator, proto = bytes(plan).partition(b"\0")
        if not separator or "deserialize" in _faults:
            return _say(self._logger, "Magic tag does not match")
        plain = _json.loads(header)
        if plain["compatible"] and not self.engine_host_code_allowed:
            return _say(self._logger, "engine host code is not allowed")
        if plain["version"] != __version__ and not plain["compatible"]:
            return _say(self._logger, "Version tag does not match")
        return ICudaEngine(plain, _onnx.load_from_string(proto), self._logger)


class ICudaEngine(_Faithful):
    def __init__(self, header, proto, logger):
        self._header, self._proto, self._logger = header, proto, logger
        self._ports = [*proto.graph.input, *proto.graph.output]
        self._open()

    def _open(self):
        import onnxruntime

        self._session = onnxruntime.InferenceSession(self._proto.SerializeToString())

    def _port(self, name):
        return next(port for port in self._ports if port.name == name)

    @property
    def num_io_tensors(self):
        return len(self._ports)

    @property
    def num_layers(self):
        return len(self._proto.graph.node)

    @property
    def refittable(self):
        return bool(self._header["refit"])

    def get_tensor_name(self, index):
        return self._ports[index].name

    def get_tensor_mode(self, name):
        inputs = {port.name for port in self._proto.graph.input}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _KINDS[self._port(name).type.tensor_type.elem_type][0]

    def get_tensor_profile_shape(self, name, profile_index):
        assert self.get_tensor_mode(name) == TensorIOMode.INPUT and profile_index == 0
        return [tuple(shape) for shape in self._header["profile"][name]]

    def create_execution_context(self):
        if "context" in _faults:
            return _say(self._logger, "OutOfMemory")
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)


class EngineInspector(_Faithful):
    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, format):
        assert format == LayerInformationFormat.JSON
        if "inspector" in _faults:
            return _faults["inspector"]
        engine = self._engine
        nodes = engine._proto.graph.node
        names = [port.name for port in engine._ports]
        quantised = {n.output[0] for n in nodes if n.op_type == "QuantizeLinear"}
        folded = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
        products = {"MatMul", "Gemm", "Conv"}
        eleven = __version__.startswith("11")

        def tensor(name, int8=quantised):
            kind = _faults.get("layers", "INT8" if name in int8 else "FP32")
            if eleven:
                return {"Name": name, "Format": "Row major linear", "DataType": kind}
            return {"Name": name, "Format/Datatype": f"Row major linear {kind} format"}

        layers = [
            {
                "Name": n.name,
                "LayerType": n.op_type,
                "Inputs": [
                    tensor(name, folded if n.op_type in products else quantised) for name in n.input
                ],
                "Outputs": [tensor(name) for name in n.output],
            }
            if engine._header["detailed"]
            else n.name
            for n in nodes
        ]
        ports = [{"Name": name, "IOMode": "Input", "DataType": "Float"} for name in names]
        bound = {"I/O Tensors": ports} if eleven else {"Bindings": names}
        return _json.dumps({"Layers": layers, **bound})


class IExecutionContext(_Faithful):
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not inside or "set_input_shape" in _faults:
            _say(self._engine._logger, f"{name} is outside the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self):
        if "infer_shapes" in _faults:
            return ["somewhere"]
        return [p.name for p in self._engine._proto.graph.input if p.name not in self._shapes]

    def get_tensor_shape(self, name):
        axes = {}
        for port in self._engine._proto.graph.input:
            for dim, size in zip(
                port.type.tensor_type.shape.dim, self._shapes[port.name], strict=True
            ):
                axes[dim.dim_param] = size
        dims = self._engine._port(name).type.tensor_type.shape.dim
        return tuple(axes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims)

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return "set_tensor_address" not in _faults

    def execute_async_v3(self, stream_handle):
        if stream_handle == 0 or "execute" in _faults:
            _say(self._engine._logger, "the enqueue failed")
            return False
        _cuda._queues[stream_handle].append(self._run)
        return True

    def _run(self):
        engine = self._engine
        feeds = {}
        for port in engine._proto.graph.input:
            dtype = _KINDS[port.type.tensor_type.elem_type][1]
            feeds[port.name] = self._view(port.name, self._shapes[port.name], dtype).copy()
        for name, result in zip(
            (port.name for port in engine._proto.graph.output),
            engine._session.run(None, feeds),
            strict=True,
        ):
            if "outputs" in _faults:
                result = _faults["outputs"](result)
            drift = _faults.get("drift", 0.0) * result.std()
            self._view(name, result.shape, result.dtype)[...] = result + result.dtype.type(drift)

    def _view(self, name, shape, dtype):
        size = int(_np.prod(shape)) * _np.dtype(dtype).itemsize
        return _cuda._device[self._addresses[name]][:size].view(dtype).reshape(shape)


class Refitter(_Faithful):
    def __init__(self, engine, logger):
        self._engine, self._logger, self._given = engine, logger, {}

    def get_all_weights(self):
        return list(self._engine._header["refit"])

    def get_weights_prototype(self, name):
        (tensor,) = (t for t in self._engine._proto.graph.initializer if t.name == name)
        return Weights(_onnx.numpy_helper.to_array(tensor))

    def set_named_weights(self, name, weights):
        fits = name in self._engine._header["refit"] and "set_named_weights" not in _faults
        if fits:
            self._given[name] = weights
        else:
            _say(self._logger, f"{name} is not refittable")
        return fits

    def get_missing_weights(self):
        missing = set(self._engine._header["refit"]) - set(self._given)
        return sorted(missing) + list(_faults.get("missing", ()))

    def refit_cuda_engine_async(self, stream_handle):
        if stream_handle == 0 or "refit" in _faults:
            _say(self._logger, "the refit failed")
            return False
        _cuda._queues[stream_handle].append(self._refit)
        return True

    def _refit(self):
        for tensor in self._engine._proto.graph.initializer:
            weights = self._given.get(tensor.name)
            if weights is not None and tensor.name != _faults.get("forgotten"):
                array = weights._array.reshape(tuple(tensor.dims))
                tensor.CopyFrom(_onnx.numpy_helper.from_array(array, tensor.name))
        self._engine._open()


assert {n for n in globals() if n[0] != "_"} <= set(_NAMES)
