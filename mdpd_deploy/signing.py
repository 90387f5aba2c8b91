"""Signing a bundle with an elliptic-curve key, offline, in the form of OpenSSF model signing.

The signature lies beside the bundle, as `BUNDLE.sig`: a bundle refuses files that it does not
list, and what is signed must not change by being signed. It covers every file of the folder, the
manifest included, so an engine that is built later asks for a new signature. The library's own
command, `model_signing verify key`, reads it too. No torch here (D27).
"""

import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from mdpd_deploy.errors import UserError, VerificationError, missing_extra
from mdpd_deploy.files import atomic_path
from mdpd_deploy.manifest import list_files

SUFFIX = ".sig"
MAX_BYTES = 16_000_000  # of a signature file; a real one has some 300 bytes per file
_ANOTHER_KEY = "it is another key's, or damaged"


def signature_path(bundle: Path) -> Path:
    """Return where a bundle's signature lies."""
    folder = bundle.resolve()
    return folder.with_name(folder.name + SUFFIX)


def sign_folder(folder: Path, key: Path, *, password: str | None = None) -> Path:
    """Sign every file of a sound bundle; return the signature's path.

    Args:
        folder: The bundle.
        key: Private key, PEM, on the curve P-256, P-384 or P-521.
        password: Of the key, if it has one.

    Raises:
        UserError: If the key cannot be used.
    """
    signing, hashing = _library()
    try:
        config = signing.Config().use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
    except Exception as err:  # ValueError, TypeError, UnsupportedAlgorithm, …
        raise _unusable("private", key, err) from err
    with atomic_path(signature_path(folder)) as temporary:
        config.set_hashing_config(_every_file(hashing)).sign(folder.resolve(), temporary)
    return signature_path(folder)


def needs_password(key: Path) -> bool:
    """Return whether a private key is encrypted."""
    return key.is_file() and b"ENCRYPTED" in key.read_bytes()


def check_signature(folder: Path, key: Path, signature: Path | None = None) -> None:
    """Check that every file of a folder is what the owner of a key signed; parses none of them.

    Args:
        folder: The bundle.
        key: Public key, PEM.
        signature: Default: `signature_path(folder)`.

    Raises:
        UserError: If there is no such folder, or the key cannot be used.
        VerificationError: If there is no signature, it is another key's, or a file has changed.
    """
    verifying, hashing = _library(verify=True)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a bundle: give the folder that `mdpd export` wrote.")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as err:  # ValueError, TypeError, UnsupportedAlgorithm, …
        raise _unusable("public", key, err) from err
    place = signature or signature_path(folder)
    if not place.is_file():
        raise VerificationError(
            f"bundle {folder} is not signed: {place} does not exist; take the signature from where "
            "the bundle came from, or sign it with `mdpd sign`."
        )
    present = set(list_files(folder))
    try:
        if place.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints its warnings
            config.set_hashing_config(_every_file(hashing)).verify(folder.resolve(), place)
        unsigned = sorted(present - _signed_names(place))
        if unsigned:
            raise ValueError(f"it leaves out {unsigned[0]}")
    except Exception as err:  # InvalidSignature, ValueError, KeyError, …
        raise VerificationError(
            f"the signature {place} does not fit bundle {folder} with the key {key} "
            f"({_reason(err)}); take a sound copy, or sign the bundle again."
        ) from err


def _library(*, verify: bool = False) -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as err:
        raise missing_extra(err.name or "model_signing", "sign", "a signature") from err
    return (verifying if verify else signing), hashing


def _every_file(hashing: Any) -> Any:
    """By default the library leaves out the files of git."""
    return hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)


def _signed_names(signature: Path) -> set[str]:
    """Return the files that a signature names: a signer may have left some out on purpose."""
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}


def _reason(err: Exception) -> str:
    text = str(err)
    if type(err).__name__ == "InvalidSignature" or text.startswith("Key mismatch"):
        return _ANOTHER_KEY
    return " ".join(text.split())[:300] or type(err).__name__


def _unusable(kind: str, key: Path, err: Exception) -> UserError:
    return UserError(
        f"{key} cannot be used as the {kind} key ({_reason(err)}): give a PEM file on the curve "
        "P-256, P-384 or P-521."
    )
