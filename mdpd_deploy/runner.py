"""Runs an exported graph with ONNX Runtime on the device that was asked for. No torch (D27)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.errors import UserError, WorkFailed, missing_extra
from mdpd_deploy.machine import cpu_count

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# On a GPU ONNX Runtime keeps shape arithmetic on the CPU on purpose; these must not be there.
COMPUTE_OPS = frozenset({"MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Erf", "Gelu"})


class OnnxRunner:
    """A batch of named arrays in, one array out.

    Args:
        path: The `.onnx` file.
        device: "cpu" or "cuda".
        threads: Threads inside one operator; default: the CPU quota.
        entries: Further session configuration entries of ONNX Runtime, by their own names.

    Attributes:
        provider: The execution provider that the session really uses.
        input_names: The graph's inputs in order.
        output_name: The graph's output.
        metadata: The graph's own `mdpd.*` notes.

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
    ) -> None:
        self.device = device
        self.threads = threads or cpu_count()
        self._session = open_session(path, device, self.threads, entries=entries)
        self.provider: str = self._session.get_providers()[0]
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        (output,) = self._session.get_outputs()
        self.output_name: str = output.name
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run one batch.

        Args:
            arrays: Every input by name, batch axis first.

        Returns:
            The output [B, C], float32.
        """
        (result,) = self._session.run([self.output_name], arrays)
        return np.asarray(result, dtype=np.float32)


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
    path: Path, device: str, threads: int, *, entries: Mapping[str, str] | None = None
) -> Any:
    """Open a graph with ONNX Runtime and make sure that it runs on the device asked for.

    Args:
        path: The `.onnx` file.
        device: "cpu" or "cuda".
        threads: Threads inside one operator.
        entries: Further session configuration entries of ONNX Runtime, by their own names.

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
        session = ort.InferenceSession(str(path), options, providers=chosen)
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
