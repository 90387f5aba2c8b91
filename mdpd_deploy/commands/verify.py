"""`mdpd verify`: is this bundle what its export proved it to be? (no torch)"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.commands.options import CpuRuntime, CpuRuntimeWord
from mdpd_deploy.commands.verb import Json, check_word, print_json, takes
from mdpd_deploy.errors import UserError, VerificationError

if TYPE_CHECKING:
    from mdpd_deploy.checks.verification import Check


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        bundle: The folder.
        device: cpu or cuda.
        checks: Every check, in the order in which they were done.
    """

    bundle: str
    device: str
    checks: tuple[Check, ...]

    @property
    def unsound(self) -> list[str]:
        """Names of the checks that did not pass."""
        from mdpd_deploy.checks.verification import SOUND

        return [check.name for check in self.checks if check.verdict not in SOUND]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "passed": not self.unsound}


def verify_bundle(
    bundle: Annotated[Path | str, typer.Argument(metavar="BUNDLE")],
    *,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="The data of the export's metric, to measure it again; digits needs none."
        ),
    ] = None,
    key: Annotated[
        Path | str | None, typer.Option(help="Public key, PEM: the signature must be this key's.")
    ] = None,
    signature: Annotated[
        Path | str | None,
        typer.Option(help="The signature. Default: BUNDLE.sig, beside the bundle."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="NAME[@VERSION]", help="What it must have been signed as."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, to run the graph on.")] = "cpu",
    runtime: CpuRuntimeWord = None,
) -> Report:
    """Check a bundle again from what it holds: exit code 0 only when every check passes.

    A bundle with a changed, missing or foreign file is refused before anything in it is used.

    Returns:
        Every check with its verdict; a failed one does not raise.

    Raises:
        UserError: If the folder is no bundle, was changed, or an option cannot be used.
        VerificationError: If a key is given and the bundle is not signed with it, or under another name.

    Example:
        >>> from mdpd_deploy import verify_bundle
        >>> verify_bundle(folder / "bundle").unsound
        []
    """
    from mdpd_deploy.artifacts.signing import load_signed
    from mdpd_deploy.checks.verification import Subject, verify
    from mdpd_deploy.commands.evaluate import SELF_CONTAINED, bundle_splits

    check_word("--runtime", runtime, CpuRuntime)
    if signature is not None and key is None:
        raise UserError("--signature is checked with a key: add --key with the public key.")
    if expect is not None and key is None:
        raise UserError("--expect is read from the signature: add --key with the public key.")
    place = None if signature is None else Path(signature)
    public = None if key is None else Path(key)
    opened, signed = load_signed(Path(bundle), public, place, expect=expect)
    _require(runtime or opened.runtime, device)
    validation = None
    if opened.mixed and eval_data is not None:
        raise UserError(
            f"--eval-data is one task's, and {bundle} has several: measure each with "
            f"`mdpd eval {quote(str(bundle))} --task NAME --data {quote(str(eval_data))}`."
        )
    if eval_data is not None or opened.manifest["task"] in SELF_CONTAINED:
        validation = bundle_splits(opened, opened.task(None), eval_data)["validation"]
    signer = None if signed is None else f"{key}" + (f" as {signed.name}" if signed.name else "")
    checks = verify(Subject(opened, device, runtime, validation, signer))
    return Report(str(bundle), device, tuple(checks))


def _require(runtime: str, device: str) -> None:
    """Raise `UserError` where the runtime or its device is not there, before any check is done."""
    from mdpd_deploy.runtimes.onnx import provider_of
    from mdpd_deploy.runtimes.openvino import import_openvino, refuse_device

    if runtime == "onnx":
        provider_of(device)
    else:
        refuse_device(device)
        import_openvino()


@takes(verify_bundle)
def command(json: Json = False, **asked: Any) -> None:
    report = verify_bundle(**asked)
    if json:
        print_json(report.to_json())
    else:
        from mdpd_deploy.report.terminal import print_table

        title = f"{report.bundle} on {report.device}"
        rows = [(check.name, check.verdict, check.note) for check in report.checks]
        print_table(title, ("check", "verdict", "what was seen"), rows)
    if report.unsound:
        raise VerificationError(
            f"bundle {report.bundle} did not pass: {', '.join(report.unsound)}."
        )
