"""latency.json: what was timed, with what, and what it allows to be said (contract 3.4)."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdpd_deploy.files import write_text

SCHEMA = "mdpd.latency/1"
DEPLOYED = "deployed"
CONTROL = "deployed (A/A)"


@dataclass(frozen=True)
class VariantNote:
    """One model of the comparison.

    Attributes:
        name: `deployed`, `deployed (A/A)`, `bare` or the name of a side network.
        what: One sentence.
        untrained: True when its weights are random: good for latency only.
        parameters: Parameters that inference carries; None when only a graph is known.
    """

    name: str
    what: str
    untrained: bool
    parameters: int | None


@dataclass(frozen=True)
class Row:
    """Times of one variant in one cell (runtime × precision × batch).

    Attributes:
        size: Shape of one example, or its tokens.
        n: Timed calls.
        p99_ms: None below 1000 calls.
        items_per_s: Examples through all timed calls, one call after the other.
        device_p50_ms: Device time alone; PyTorch on CUDA only.
        nodes: Operators of the ONNX graph; for torch, operators run by one forward without views.
        flops: Of one call on the first batch; None when only a graph is known.
        warmup: {calls, seconds, settled}.
    """

    variant: str
    runtime: str
    precision: str
    device: str
    batch: int
    size: str
    n: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None
    items_per_s: float
    device_p50_ms: float | None
    nodes: int | None
    flops: int | None
    warmup: dict[str, Any]


@dataclass(frozen=True)
class RatioRow:
    """time(variant) / time(deployed) of one cell with its 95 % interval, as `estimate.Ratio`."""

    variant: str
    over: str
    runtime: str
    precision: str
    device: str
    batch: int
    median: float
    ci95: tuple[float, float]
    rounds: int
    openings: list[float]
    control: bool
    verdict: str
    words: str
    nodes_ratio: float | None
    flops_ratio: float | None


@dataclass(frozen=True)
class Raw:
    """Nanoseconds per round; round r of a cell is the same moment for all its variants."""

    runtime: str
    batch: int
    variant: str
    times_ns: list[int]


@dataclass(frozen=True)
class CellNote:
    """How one cell was measured; `openings` are the rounds of each, in order."""

    runtime: str
    batch: int
    rounds: int
    seconds: float
    reached: bool
    openings: list[int]
    copies: dict[str, float] | None


@dataclass(frozen=True)
class Identity:
    """Node-for-node comparison of the deployed graph with the bare backbone's."""

    compared: tuple[str, str]
    nodes: int
    identical: bool
    differences: list[str]


@dataclass
class LatencyReport:
    """Everything a benchmark found.

    Attributes:
        source: {kind, name, task, method, side, backbone}.
        settings: {device, threads, seed, seconds, inputs, ...}: enough to repeat it.
        claims: Sentences that the intervals allow.
        warnings: What speaks against them: that the machine was busy.
        machine: Processor, GPUs, versions; GPU state before and after; shares of the processors'
            time that others took meanwhile.
    """

    source: dict[str, Any]
    settings: dict[str, Any]
    margin: float
    variants: list[VariantNote] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ratios: list[RatioRow] = field(default_factory=list)
    cells: list[CellNote] = field(default_factory=list)
    identity: Identity | None = None
    claims: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    raw: list[Raw] = field(default_factory=list)

    @property
    def runtimes(self) -> list[str]:
        """The runtimes that were timed, in order."""
        return list(dict.fromkeys(row.runtime for row in self.rows))

    def ratios_of(self, runtime: str) -> list[RatioRow]:
        """Return the ratios of one runtime, batch by batch."""
        return [ratio for ratio in self.ratios if ratio.runtime == runtime]

    @property
    def untrained(self) -> set[str]:
        """The variants whose weights are random."""
        return {note.name for note in self.variants if note.untrained}

    def to_dict(self, *, raw: bool = True) -> dict[str, Any]:
        """Return the JSON form; `raw` keeps the time of every round."""
        plain = {"schema": SCHEMA, **asdict(self)}
        if not raw:
            del plain["raw"]
        return plain

    def write(self, path: Path) -> None:
        """Write latency.json; the raw times stay on one line per variant and cell."""
        head = json.dumps(self.to_dict(raw=False), indent=2, allow_nan=False, ensure_ascii=False)
        lines = ",\n".join(f"    {json.dumps(asdict(raw))}" for raw in self.raw)
        write_text(path, head.removesuffix("\n}") + ',\n  "raw": [\n' + lines + "\n  ]\n}\n")


def write_claims(report: LatencyReport) -> list[str]:
    """Return one sentence per runtime and rival: where the deployed model is faster, where not."""
    sentences = []
    for runtime in report.runtimes:
        rivals = [ratio for ratio in report.ratios_of(runtime) if not ratio.control]
        for note in report.variants:
            if ratios := [ratio for ratio in rivals if ratio.variant == note.name]:
                sentences.append(_claim(note, ratios))
    return sentences


def _claim(note: VariantNote, ratios: list[RatioRow]) -> str:
    rival = f"{note.name} (untrained)" if note.untrained else note.name
    parts = []
    for code, clause in (
        ("slower", "deployed is faster than {} at batch {}"),
        ("same", "deployed runs as fast as {} at batch {}"),
        ("faster", "deployed is slower than {} at batch {}"),
        ("cannot-tell", "against {} this machine cannot tell at batch {}"),
    ):
        if found := [_batch_words(ratio) for ratio in ratios if ratio.verdict == code]:
            parts.append(clause.format(rival, ", ".join(found)))
    first = ratios[0]
    return f"{first.runtime} on {first.device}, {first.precision}: {'; '.join(parts)}."


def _batch_words(ratio: RatioRow) -> str:
    if ratio.verdict != "same":
        low, high = ratio.ci95
        return f"{ratio.batch} ({ratio.median:.2f}×, 95 % {low:.2f}-{high:.2f})"
    return str(ratio.batch)
