"""The fade certificate: what an export proved, in the form that lets a bundle be checked again.

`manifest.verification` holds a verdict and a sentence per gate; `parity.json`, read here, the
numbers. The digests in it come from the bare backbone, which the export traced on its own, so they
say what `model.onnx` must be without that backbone at hand. No torch here.
"""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mdpd_deploy.artifacts.manifest import PARITY_FILE
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.files import Read, read_json

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


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
    """What a task's inputs and outputs mean; see `bundle_tasks.meaning_of`."""

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
    """One batch that went through PyTorch and the graph."""

    name: str
    max_abs_diff: float = Field(ge=0)
    finite: bool


class Parity(_Record):
    """How far the graph's outputs are from PyTorch's, in standard deviations of the outputs.

    Without a tolerance the difference was reported, not gated.
    """

    cases: list[Case] = Field(min_length=1)
    spread: float = Field(gt=0)
    scaled_diff: float = Field(ge=0)
    tolerance: float | None = Field(ge=0)
    passed: bool


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

    Args:
        bundle: The folder.
        task: Which task's, where the bundle answers several.
        read: How files are read.

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
