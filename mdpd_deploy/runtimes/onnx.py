"""Runs an exported graph with ONNX Runtime on the device that was asked for. No torch."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.manifest import EXTERNAL_FILE
from mdpd_deploy.errors import UserError, WorkFailed, missing_extra
from mdpd_deploy.files import Read
from mdpd_deploy.machine import cpu_count
from mdpd_deploy.runtimes.base import TASK_ID, Outputs, check_task_ids, task_names

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# On a GPU ONNX Runtime keeps shape arithmetic on the CPU on purpose; these must not be there.
COMPUTE_OPS = frozenset({"MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Erf", "Gelu"})

# Their kernels take longer on a CPU than the nodes that they replace (benchmarks/norm_fusion.py).
SLOW_FUSIONS = {"cpu": ["SkipLayerNormFusion"]}


class OnnxRunner:
    """A graph in ONNX Runtime: a batch of named arrays in, its outputs by name out.

    Args:
        path: The `.onnx` file.
        device: "cpu" or "cuda".
        threads: Threads inside one operator; default: the CPU quota.
        entries: Further session configuration entries of ONNX Runtime, by their own names.
        read: As in `open_session`.

    Attributes:
        provider: The execution provider that the session really uses.
        input_names: The graph's inputs in order.
        output_names: The graph's outputs in order.
        metadata: The graph's own `mdpd.*` notes.
        task_names: Tasks by `task_id`; empty for a graph without that input.
        replaceable: Weights that a run may be fed in place of the graph's own, with their shapes.
        max_batch: None: any batch.
        failed: None: a run that fails says nothing of the next one.

    Raises:
        UserError: If ONNX Runtime or the device is missing, or the graph cannot be loaded.
        WorkFailed: If the session was made but does not run on the device that was asked for.
            `session.disable_cpu_ep_fallback` is not used: it refuses every graph that computes a
            shape, since those nodes belong on the CPU. The node assignment is read instead.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        entries: Mapping[str, str] | None = None,
        read: Read | None = None,
    ) -> None:
        self.device = device
        self.threads = threads or cpu_count()
        self.max_batch: int | None = None
        self.failed: str | None = None
        self._session = open_session(path, device, self.threads, entries=entries, read=read)
        self.provider: str = self._session.get_providers()[0]
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.task_names = task_names(self.metadata)
        self.replaceable: dict[str, tuple[int, ...]] = {
            item.name: tuple(item.shape) for item in self._session.get_overridable_initializers()
        }

    def __call__(self, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
        """Run one batch.

        Returns:
            Every output by name, batch axis first, float32.

        Raises:
            UserError: If `task_id` is missing or names no task. ONNX Runtime counts a negative one
                from the end, and would spread a single one over the whole batch.
            WorkFailed: If ONNX Runtime cannot run them: a wrong name, type or shape, or no memory.
        """
        if TASK_ID in self.input_names:
            check_task_ids(arrays, self.task_names)
        try:
            results = self._session.run(list(self.output_names), dict(arrays))
        except Exception as err:  # ONNX Runtime has no base class of its own for these
            raise WorkFailed(
                f"ONNX Runtime could not run the graph: {str(err).splitlines()[0][:300]}"
            ) from err
        pairs = zip(self.output_names, results, strict=True)
        return {name: np.asarray(result, dtype=np.float32) for name, result in pairs}


def provider_of(device: str) -> str:
    """Return the execution provider of "cpu" or "cuda"; `UserError` when this machine lacks it."""
    ort = _onnxruntime()
    if device not in PROVIDERS:
        raise UserError(f"--device {device}: choose one of {', '.join(PROVIDERS)}.")
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise UserError(
            f"--device {device}: the installed ONNX Runtime has no {provider}; use --device cpu, or "
            'exchange it: pip uninstall onnxruntime; pip install "mdpd-deploy[onnx-gpu]"'
        )
    return provider


def compute_nodes_on_cpu(session: Any) -> list[str]:
    """Return the heavy nodes that the session placed on the CPU (see `COMPUTE_OPS`)."""
    return [
        node.name
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"]
        for node in part.get_nodes()
        if node.op_type in COMPUTE_OPS
    ]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as err:
        raise missing_extra("onnxruntime", "onnx", "running an exported model") from err
    return onnxruntime


def open_session(
    path: Path,
    device: str,
    threads: int,
    *,
    entries: Mapping[str, str] | None = None,
    read: Read | None = None,
) -> Any:
    """Open a graph with ONNX Runtime and make sure that it runs on the device asked for.

    Args:
        path: The `.onnx` file.
        device: "cpu" or "cuda".
        threads: Threads inside one operator.
        entries: Further session configuration entries of ONNX Runtime, by their own names.
        read: How the graph's files are read. ONNX Runtime then holds weights of its own, which no
            change of the files reaches; None = it opens the files itself, and maps large weights.

    Raises:
        UserError: If ONNX Runtime or the device is missing, or the graph cannot be loaded.
        WorkFailed: If the session does not run on the device that was asked for.
    """
    ort = _onnxruntime()
    provider = provider_of(device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings are for graph authors
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    chosen = list(dict.fromkeys([provider, PROVIDERS["cpu"]]))
    try:
        with (
            _in_memory(path, options, read) if read else contextlib.nullcontext(str(path)) as graph
        ):
            session = ort.InferenceSession(
                graph, options, providers=chosen, disabled_optimizers=SLOW_FUSIONS.get(device)
            )
    except UserError:
        raise
    except Exception as err:  # ONNX Runtime has no base class of its own for these
        reason = str(err).splitlines()[0]
        raise UserError(f"{path} is not a graph that ONNX Runtime can load: {reason}") from err
    got = session.get_providers()[0]
    if got != provider:
        raise WorkFailed(
            f"--device {device} was asked for, but ONNX Runtime fell back to {got}: its GPU "
            "libraries could not be loaded. Use --device cpu or mend the CUDA installation."
        )
    stray = compute_nodes_on_cpu(session) if device != "cpu" else []
    if stray:
        raise WorkFailed(
            f"--device {device}: ONNX Runtime would run {len(stray)} compute nodes on the CPU "
            f"(first: {stray[0]}). Use --device cpu or a newer onnxruntime-gpu."
        )
    return session


@contextlib.contextmanager
def _in_memory(path: Path, options: Any, read: Read) -> Iterator[str | bytes]:
    """Yield a graph that was read, for a session with these options.

    ONNX Runtime keeps a graph that it is given as bytes for as long as it lives; a file in memory
    that ends here has it let go of them.
    """
    external = path.with_name(EXTERNAL_FILE)
    if external.is_file():
        weights = read(external)  # lives as long as this block, which is what ONNX Runtime asks
        options.add_external_initializers_from_files_in_memory(
            [EXTERNAL_FILE], [weights], [len(weights)]
        )
        yield read(path)  # the graph alone is small
    elif hasattr(os, "memfd_create"):
        with open(os.memfd_create(path.name), "wb") as file:
            file.write(read(path))
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield read(path)
