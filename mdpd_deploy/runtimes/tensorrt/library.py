"""TensorRT as installed: found when it is needed, its messages kept, its engines opened.

One code path for 10.12 to 11: only names that exist in all of them are used, which
`tests/test_trt_names.py` compares with the real bindings.
"""

import hashlib
from pathlib import Path
from typing import Any

from mdpd_deploy.errors import UserError, WorkFailed, missing_extra

OLDEST, NEXT_MAJOR = "10.12", "12"


def import_trt(purpose: str = "a TensorRT engine") -> Any:
    """Return the module `tensorrt`.

    Raises:
        UserError: If it is not installed, cannot be loaded, or is of a version that was not tried.
    """
    from packaging.version import InvalidVersion, Version

    try:
        import tensorrt as trt  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as err:
        if getattr(err, "name", None) == "tensorrt":
            raise missing_extra("tensorrt", "trt", purpose) from err
        raise UserError(f"TensorRT is installed but cannot be loaded: {_line(err)}.") from err
    except (OSError, RuntimeError) as err:  # a library of NVIDIA's that is not there
        raise UserError(f"TensorRT is installed but cannot be loaded: {_line(err)}.") from err
    found = trt.__version__  # pyright: ignore[reportAttributeAccessIssue]
    try:
        fits = Version(OLDEST) <= Version(found) < Version(NEXT_MAJOR)
    except InvalidVersion:
        fits = False
    if not fits:
        raise UserError(
            f"TensorRT {found} is installed, this version of mdpd-deploy works with "
            f'{OLDEST} up to, not including, {NEXT_MAJOR}: pip install "mdpd-deploy[trt]"'
        )
    return trt


def recording_logger(trt: Any) -> Any:
    """Return a logger for TensorRT that keeps `errors` and `warnings` as lists of sentences."""

    class RecordingLogger(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding needs its own constructor called
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(msg)

    return RecordingLogger()


def said(messages: list[str], *, most: int = 2) -> str:
    """Return the last of TensorRT's messages in one line, fit for the end of a sentence."""
    kept = [" ".join(text.split())[:300].rstrip(".") for text in messages[-most:]]
    return "; ".join(kept) or "TensorRT gave no reason"


def open_engine(
    trt: Any, plan: Path, logger: Any, *, host_code: bool, sha256: str | None = None
) -> tuple[Any, Any]:
    """Deserialise a plan.

    Args:
        trt: From `import_trt`.
        plan: The file.
        logger: From `recording_logger`.
        host_code: Allow the code that version-compatible plans carry for the processor.
        sha256: Of the bytes that are deserialised, which are native code; None = the caller has
            just built them.

    Returns:
        The engine, and the runtime that must live as long as it does.

    Raises:
        UserError: If the file has another checksum.
        WorkFailed: If TensorRT refuses it; there is no way to ask beforehand.
    """
    raw = plan.read_bytes()
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(f"the engine {plan} was changed while it was opened; take a sound copy.")
    runtime = trt.Runtime(logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(raw)
    if engine is None:
        raise WorkFailed(
            f"TensorRT {trt.__version__} refuses the engine {plan.name}: {said(logger.errors)}. "
            "Build it again with `mdpd build-engine`."
        )
    return engine, runtime


def _line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")
