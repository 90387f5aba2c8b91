"""`mdpd verify`: is this bundle what its export proved it to be? (ONNX Runtime, no torch)"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.errors import VerificationError

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
        checks = [asdict(check) for check in self.checks]
        return {
            "bundle": self.bundle,
            "device": self.device,
            "passed": not self.unsound,
            "checks": checks,
        }


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    eval_data: Annotated[
        str | None,
        typer.Option(help="The data of the export's metric, to measure it again."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Public key, PEM: the signature must be this key's.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="The signature. Default: BUNDLE.sig, beside the bundle.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="NAME[@VERSION]", help="What it must have been signed as."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, to run the graph on.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON only.")] = False,
) -> None:
    """Check a bundle again from what it holds: exit code 0 only when every check passes.

    A bundle with a changed, missing or foreign file is refused before anything in it is used.
    """
    report = verify_bundle(
        bundle, eval_data=eval_data, key=key, signature=signature, expect=expect, device=device
    )
    if json:
        import json as encoder

        typer.echo(encoder.dumps(report.to_json(), indent=2))
    else:
        _print(report)
    if report.unsound:
        raise VerificationError(f"bundle {bundle} did not pass: {', '.join(report.unsound)}.")


def verify_bundle(
    bundle: str | Path,
    *,
    eval_data: str | None = None,
    key: str | Path | None = None,
    signature: str | Path | None = None,
    expect: str | None = None,
    device: str = "cpu",
) -> Report:
    """Check a bundle again from what it holds; the same words as `mdpd verify`.

    Args:
        bundle: The folder.
        eval_data: The data of the export's metric, to measure it again; not needed for `digits`.
        key: Public key (PEM) that must have signed the bundle; None = any bundle is checked.
        signature: The signature; None = `BUNDLE.sig` beside the bundle.
        expect: NAME or NAME@VERSION that the bundle must have been signed as (`sign_bundle`).
        device: cpu or cuda, to run the graph on.

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
    from mdpd_deploy.runtimes.onnx import provider_of

    provider_of(device)
    if signature is not None and key is None:
        from mdpd_deploy.errors import UserError

        raise UserError("--signature is checked with a key: add --key with the public key.")
    if expect is not None and key is None:
        from mdpd_deploy.errors import UserError

        raise UserError("--expect is read from the signature: add --key with the public key.")
    place = None if signature is None else Path(signature)
    public = None if key is None else Path(key)
    opened, signed = load_signed(Path(bundle), public, place, expect=expect)
    validation = None
    if opened.mixed and eval_data is not None:
        from mdpd_deploy.errors import UserError

        raise UserError(
            f"--eval-data is one task's, and {bundle} has several: measure each with "
            f"`mdpd eval {quote(str(bundle))} --task NAME --data {quote(str(eval_data))}`."
        )
    if eval_data is not None or opened.manifest["task"] in SELF_CONTAINED:
        validation = bundle_splits(opened, opened.task(None), eval_data)["validation"]
    signer = None if signed is None else f"{key}" + (f" as {signed.name}" if signed.name else "")
    checks = verify(Subject(opened, device, validation, signer))
    return Report(str(bundle), device, tuple(checks))


def _print(report: Report) -> None:
    from rich.table import Table

    from mdpd_deploy.report.terminal import Console

    table = Table(title=f"{report.bundle} on {report.device}")
    for heading in ("check", "verdict", "what was seen"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, check.verdict, check.note)
    Console(highlight=False, soft_wrap=True, markup=False).print(table)
