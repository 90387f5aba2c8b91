"""What a server may be told, and what it accepts from strangers."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from mdpd_deploy.errors import UserError
from mdpd_deploy.serve.core.refusal import shown


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; checked before anything of that size is allocated.

    Attributes:
        body_bytes: Size of a body.
        bodies_bytes: All bodies that are held in memory at once.
        header_bytes: Request line and headers.
        tensors: Inputs, or requested outputs, of one request.
        text_bytes: One text in UTF-8, before it is tokenised.
        connections: Open at once; one client may have half of them.
        ask_s: Seconds in which a connection must have sent the head of its next request.
        texts_bytes: All texts of a request.
        pixels: Width times height of a picture, read from its header; `data.images.MAX_PIXELS` at
            most. What phones make by default fits, and what a process that decodes it may take is 20
            bytes of memory for each.
    """

    body_bytes: int = 16_000_000
    bodies_bytes: int = 256_000_000
    header_bytes: int = 16_384
    tensors: int = 16
    text_bytes: int = 100_000
    connections: int = 1024
    ask_s: float = 10.0
    texts_bytes: int = 1_000_000
    pixels: int = 25_000_000


def usual_device(runtime: str | None) -> str:
    """Return the device that a runtime is opened on where none is named."""
    return "cuda" if runtime == "trt" else "cpu"


# The least and the most of each number, by the name of its option.
_RANGES: dict[str, tuple[float, float]] = {
    "threads": (1, 4096),
    "max_batch": (1, 1_000_000),
    "max_delay_ms": (0, 60_000),
    "queue": (1, 10_000_000),
    "timeout_s": (0.001, 86_400),
    "drain_s": (1, 86_400),
}


@dataclass(frozen=True)
class CoreOptions:
    """How requests are batched and run.

    Raises:
        UserError: If a number is none or out of its range, or a host is no name.

    Attributes:
        runtime: "onnx" (ONNX Runtime), "openvino", or "trt": the bundle's TensorRT engine, with
            device "cuda"; None = what each bundle was proved in.
        device: "cpu" or "cuda".
        threads: Threads inside one operator; None = the CPU quota.
        max_batch: Most rows in one run of a graph; None = the bundle's own maximum.
        max_delay_ms: How long the first row of a batch waits for others while the device is idle.
            While it is busy rows gather anyway, whatever this is; a wait costs whoever asks alone.
        queue: Most rows of one model that may be in progress; more are refused.
        timeout_s: Time from a request's arrival after which it is given up.
        drain_s: Most seconds for the requests in progress when the server is to end.
        key: Public key, PEM, that must have signed every bundle; None = any bundle is served.
        allow_hosts: Names, beside localhost and every address, by which clients may call the server;
            `*.NAME` is every name below one, `*` any.
        limits: See `Limits`.
    """

    runtime: str | None = None
    device: str = "cpu"
    threads: int | None = None
    max_batch: int | None = None
    max_delay_ms: float = 0.0
    queue: int = 256
    timeout_s: float = 30.0
    drain_s: int = 20
    key: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # a NaN is not either
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {shown(value)}: give a number of {low:g} to {high:g}.")
        for host in self.allow_hosts:
            if not re.fullmatch(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*", host):
                raise UserError(
                    f"--allow-host {shown(host)}: give a name alone, without scheme and port, as "
                    "models.example, or *.example for every name below one."
                )
