"""The fade certificate: what an export proved, in the form that lets a bundle be checked again.

`manifest.verification` holds a verdict and a sentence per gate; `parity.json`, read here, the
numbers. The digests in it come from the bare backbone, which the export traced on its own, so they
say what `model.onnx` must be without that backbone at hand. No torch here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mdpd_deploy.artifacts.manifest import PARITY_FILE
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.files import Read, read_json

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


ONE = "output"  # the only output of a graph, which is not named


def one_or_all(numbers: Mapping[str, float]) -> float | dict[str, float]:
    """Return a number of each output as it is written: alone where there is one output."""
    return dict(numbers) if len(numbers) > 1 else next(iter(numbers.values()))


def of_each(written: Any, *, names: Sequence[str] = ()) -> dict[str, float]:
    """Return what `one_or_all` wrote, by name.

    Args:
        written: One positive number, or one for each output.
        names: The outputs that there must be, in order; none given: those that are named.

    Raises:
        ValueError: If it is something else.
    """
    found = written if isinstance(written, dict) else {next(iter(names), ONE): written}
    for number in found.values():
        if type(number) not in (int, float) or not 0 < number < float("inf"):
            raise ValueError("not a positive number for each output")
    if names and set(found) != set(names):
        raise ValueError(f"numbers of {', '.join(found)}, not of {', '.join(names)}")
    return {name: float(number) for name, number in found.items()}


class _Record(BaseModel):
    """Numbers of one gate; a later version may add some."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


class Numbers(_Record):
    """How many numbers the graph's weights hold, and how many backbone and head have."""

    graph_numbers: int = Field(ge=0)
    model_numbers: int = Field(ge=0)


class Graph(_Record):
    """What the deployed graph is, in whatever precision: its operators and all of its weights."""

    structure_sha256: Digest
    values_sha256: Digest


class Meaning(_Record):
    """What a task's inputs and outputs mean; see `tasks.meaning_of`."""

    outputs_sha256: Digest
    preprocessing_sha256: Digest
    tokenizer_sha256: Digest | None


class Identity(_Record):
    """What the graph shares with the bare backbone's.

    `bare_values_sha256` is None where the method changed more than norms; both digests are None in
    bundles of before they were kept.
    """

    nodes: int = Field(ge=0)
    structure_sha256: Digest | None = None
    bare_values_sha256: Digest | None = None


class Case(_Record):
    """One output of one batch that went through PyTorch and the graph.

    The output has a name where the graph has several.
    """

    name: str
    output: str = ONE
    max_abs_diff: float = Field(ge=0)
    finite: bool


class Parity(_Record):
    """How far the graph's outputs are from PyTorch's, in standard deviations of each output.

    Without a tolerance the difference was reported, not gated.
    """

    cases: list[Case] = Field(min_length=1)
    spread: Annotated[dict[str, float], BeforeValidator(of_each)]
    scaled_diff: float = Field(ge=0)
    tolerance: float | None = Field(ge=0)
    passed: bool

    @model_validator(mode="after")
    def _spread_of_every_case(self) -> Self:
        if not {case.output for case in self.cases} <= set(self.spread):
            raise ValueError("a case of an output whose spread is not told")
        return self


class Metric(_Record):
    """The task metric through ONNX Runtime, and on which examples.

    A metric without a value is undefined on them. `allowed` is how far each metric may be off; it and the digest are None in bundles of before.
    """

    examples: int = Field(ge=1)
    onnx: dict[str, float | None] = Field(min_length=1)
    examples_sha256: Digest | None = None
    allowed: dict[str, float] | None = None


class Golden(_Record):
    """How far the graph's golden outputs are from PyTorch's, in standard deviations."""

    output_diff: float = Field(ge=0)


def _none_if_empty(value: object) -> object:
    return value or None  # a gate that did not apply has no numbers


class Certificate(_Record):
    """`parity.json`; a part is None where its gate did not apply, or before it was kept."""

    graph: Graph | None = None
    meaning: Meaning | None = None
    side_free: Annotated[Numbers | None, BeforeValidator(_none_if_empty)] = None
    identity: Annotated[Identity | None, BeforeValidator(_none_if_empty)] = None
    parity: Annotated[Parity | None, BeforeValidator(_none_if_empty)] = None
    metric: Annotated[Metric | None, BeforeValidator(_none_if_empty)] = None
    golden: Annotated[Golden | None, BeforeValidator(_none_if_empty)] = None


def read_certificate(
    bundle: Path, task: str | None = None, read: Read = Path.read_bytes
) -> Certificate:
    """Read the numbers of a bundle's gates.

    Raises:
        UserError: If the file is missing or no JSON.
        VerificationError: If it does not hold what a certificate holds.
    """
    plain = read_json(bundle / PARITY_FILE, "bundle", read)
    if task is not None:
        plain = plain.get(task) if isinstance(plain, dict) else None
    try:
        return Certificate.model_validate_json(json.dumps(plain))  # JSON's rules, strictly
    except ValidationError as err:
        problem = err.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise VerificationError(
            f"bundle {bundle}: {PARITY_FILE} is damaged at {field!r} ({problem['msg']}); "
            "export the run again."
        ) from None
