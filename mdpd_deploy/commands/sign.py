"""`mdpd sign`: vouch for a bundle with a key, offline. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mdpd_deploy.commands.verb import takes
from mdpd_deploy.errors import UserError


def sign_bundle(
    bundle: Annotated[Path | str, typer.Argument(metavar="BUNDLE")],
    *,
    key: Annotated[Path | str, typer.Option(help="Private key, PEM, on P-256, P-384 or P-521.")],
    name: Annotated[
        str | None, typer.Option(help="What the signature calls the bundle, for verify --expect.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Its version, so that no older one can stand in for it.")
    ] = None,
    password: str | None = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier signature.")] = False,
) -> Path:
    """Write BUNDLE.sig beside the bundle: a signature over every file of it.

    Args:
        password: Of the key, if it has one.

    Returns:
        The signature. The bundle is not changed; a file of it that changes later makes it void.

    Raises:
        UserError: If the bundle is not sound, is signed already, or the key, the name or the version
            cannot be used.
    """
    from mdpd_deploy.artifacts.bundle import load_bundle
    from mdpd_deploy.artifacts.signing import sign_folder, signature_path, subject_name

    if name is None and version is not None:
        raise UserError("--version is a version of something: add --name.")
    subject = None if name is None else subject_name(name, version)
    folder = load_bundle(bundle).path
    place = signature_path(folder)
    if place.exists() and not overwrite:
        raise UserError(f"{place} exists: add --overwrite to sign the bundle again.")
    return sign_folder(folder, Path(key), password=password, name=subject)


@takes(sign_bundle)
def command(**asked: Any) -> None:
    """Write BUNDLE.sig beside the bundle: a signature over every file of it.

    A key with a password asks for it; where nobody can be asked, it is read from
    MDPD_KEY_PASSWORD.
    """
    from mdpd_deploy.artifacts.signing import needs_password

    key, password = asked["key"], None
    if needs_password(key):
        password = os.environ.get("MDPD_KEY_PASSWORD")
        if password is None:
            password = str(typer.prompt(f"password of {key}", hide_input=True, err=True))
    typer.echo(f"signature: {sign_bundle(**asked, password=password)}")
