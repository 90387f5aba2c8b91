"""What a gate sees: at an export, which proves it, and at `mdpd verify`, which checks it again.

No torch here.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.certificate import Certificate, read_certificate
from mdpd_deploy.artifacts.manifest import MODEL_FILE
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.checks.policy import ParityMode
from mdpd_deploy.data.examples import Split
from mdpd_deploy.errors import MdpdError, VerificationError
from mdpd_deploy.graphs.signature import Signature, graph_signature
from mdpd_deploy.runtimes.base import Forward, Runtime

Verdict = Literal[
    "passed", "skipped", "warned", "recorded", "not applicable", "not recorded", "not run", "failed"
]
KEEPING = ("side", "prompt", "prefix")  # methods that leave something beside backbone and head
SOUND = ("passed", "recorded", "not applicable")


@contextlib.contextmanager
def sound_graph(name: str) -> Iterator[None]:
    """Turn what protobuf, onnx and numpy stumble on in a broken graph into `VerificationError`."""
    try:
        yield
    except MdpdError:
        raise
    except Exception as err:
        raise VerificationError(f"{name} is no sound graph ({err!r:.200})") from err


@dataclass(frozen=True)
class Seen:
    """What a gate saw.

    Attributes:
        verdict: One that fails at an export raises instead, or warns where the user asked for that.
        note: One sentence.
        details: Numbers for `parity.json`.
    """

    verdict: Verdict
    note: str
    details: dict[str, Any] = field(default_factory=dict)


def judged(
    name: str, note: str, problems: list[str], details: dict[str, Any], mode: ParityMode
) -> Seen:
    """Return what a gate with these problems saw; raises `VerificationError` unless they may be."""
    if not problems:
        return Seen("passed", note, details)
    told = "; ".join(problems)
    if mode == "fail":
        raise VerificationError(
            f"{name}: {told}. Choose another precision, or --parity warn to keep it all the same."
        )
    return Seen("warned", f"{told} (--parity warn)", details)


DEPLOYS_MORE = Seen("not applicable", "this method deploys more than the backbone and a head")
TOO_OLD = Seen("not recorded", "exported before this was recorded: export the run again")


@dataclass(frozen=True, eq=False)
class Subject:
    """A bundle that is checked, with the device and the data for it.

    Attributes:
        bundle: As `load_bundle` gave it, so its files and schema are sound.
        device: "cpu" or "cuda".
        runtime: As in `Bundle.runner`.
        validation: The examples that the export measured, if they are at hand.
        signer: The public key that the signature was checked with, if it was.
        failed: Names of the checks that failed so far.
        asked: The task that is checked; None: the bundle as a whole, or its only task.
        opened: The graph by device, once it is open.
    """

    bundle: Bundle
    device: str = "cpu"
    runtime: str | None = None
    validation: Split | None = None
    signer: str | None = None
    failed: set[str] = field(default_factory=set)
    asked: BundleTask | None = None
    opened: dict[str, Runtime] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path

    @property
    def faded(self) -> bool:
        """Whether nothing is deployed beside backbone and head: then every proof is asked for.

        It follows from the method and from what the export proved. What the manifest says of it
        counts for nothing, since one word of it would switch the proofs off.
        """
        if self.bundle.mixed or self.bundle.manifest["method"] not in KEEPING:
            return True
        record = self.certificate
        return record.identity is not None or record.side_free is not None

    @property
    def precision(self) -> str:
        """What the graph's weights were converted to."""
        return self.bundle.precision_in("onnx")

    @property
    def task(self) -> BundleTask:
        """The task that is checked."""
        return self.asked or self.bundle.task()

    @property
    def needs_gpu(self) -> bool:
        """Whether no runtime has kernels for this precision on the device."""
        return self.precision == "bf16" and self.device == "cpu"

    @property
    def refused(self) -> Seen | None:
        """What is said of a graph that is not what was exported: it is not run."""
        unfit = self.failed & {"graph", "side_free", "identity", "parameters"}
        return Seen("not run", f"the graph failed {min(unfit)}") if unfit else None

    def said_at_export(self, gate: str) -> tuple[str, str]:
        """Return verdict and note of a gate of the export; empty when there is none."""
        entry = self.task.facts["verification"].get(gate)
        if not isinstance(entry, dict):
            return "", ""
        return str(entry.get("verdict", "")), str(entry.get("note", ""))

    @cached_property
    def certificate(self) -> Certificate:
        """The numbers of the export's gates."""
        return self._certificate_of(self.task)

    @property
    def certificates(self) -> dict[str, Certificate]:
        """The numbers of every task's gates, by its name."""
        return {task.name: self._certificate_of(task) for task in self.bundle.tasks}

    def _certificate_of(self, task: BundleTask) -> Certificate:
        name = task.name if self.bundle.mixed else None
        return read_certificate(self.path, name, self.bundle.read)

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """The graph without weights that lie outside its file."""
        return onnx.load_model_from_string(self.bundle.read(self.path / MODEL_FILE))

    @cached_property
    def signature(self) -> Signature:
        """The graph's structure and the digests of its weights."""
        with sound_graph(MODEL_FILE):
            return graph_signature(self.path / MODEL_FILE, self.bundle.read)

    @property
    def runner(self) -> Runtime:
        """The graph on the device."""
        if self.device not in self.opened:
            self.opened[self.device] = self.bundle.runner(self.device, runtime=self.runtime)
        return self.opened[self.device]

    @property
    def forward(self) -> Forward:
        """The task's own outputs from the graph."""
        return self.bundle.runner_of(self.task, self.runner)
