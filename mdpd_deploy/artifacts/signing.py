"""Signing a bundle with an elliptic-curve key, offline, in the form of OpenSSF model signing.

The signature lies beside the bundle, as `BUNDLE.sig`: a bundle refuses files that it does not
list, and what is signed must not change by being signed. It covers every file of the folder, the
manifest included, so an engine that is built later asks for a new signature. The library's own
command, `model_signing verify key`, reads it too. No torch here.

A signature may carry a name and a version, as the package URL of its subject. Whoever asks for them
is not served an old signed bundle in the place of a new one, nor one model in the place of another.
"""

import base64
import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdpd_deploy.artifacts.bundle import Bundle, load_bundle
from mdpd_deploy.artifacts.manifest import FILE, upgraded
from mdpd_deploy.artifacts.sealed import list_files
from mdpd_deploy.errors import UserError, VerificationError, missing_extra
from mdpd_deploy.files import atomic_path

SUFFIX = ".sig"
MAX_BYTES = 16_000_000  # of a signature file; a real one has some 300 bytes per file
_SUBJECT = "pkg:generic/"  # a package URL; without it a subject is the folder's name, as of old
_WORD = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
_ANOTHER_KEY = "it is another key's, or damaged"


def signature_path(bundle: Path) -> Path:
    """Return where a bundle's signature lies."""
    folder = bundle.resolve()
    return folder.with_name(folder.name + SUFFIX)


@dataclass(frozen=True)
class Signed:
    """What a signature says, once it was found to be the key's.

    Attributes:
        name: What the signer called the bundle, NAME or NAME@VERSION; None when nothing.
        manifest_sha256: Of `manifest.json`, which lists all other files.
    """

    name: str | None
    manifest_sha256: str

    def require_same(self, folder: Path, plain: Mapping[str, Any]) -> None:
        """Raise `VerificationError` unless the manifest that was read is the one that was signed.

        Between a check of the signature and the opening of a bundle the folder may change.
        """
        raw = (folder / FILE).read_bytes()
        if (
            hashlib.sha256(raw).hexdigest() != self.manifest_sha256
            or upgraded(json.loads(raw)) != plain
        ):
            raise VerificationError(
                f"bundle {folder} changed after its signature was checked: take a sound copy."
            )


def subject_name(name: str, version: str | None = None) -> str:
    """Return NAME or NAME@VERSION; `UserError` unless both are plain words."""
    for option, word in (("--name", name), ("--version", version)):
        if word is not None and not re.fullmatch(_WORD, word):
            raise UserError(
                f"{option} {word!r:.80}: give up to 64 letters, digits and . _ + -, the first one a "
                "letter or digit."
            )
    return name if version is None else f"{name}@{version}"


def sign_folder(
    folder: Path, key: Path, *, password: str | None = None, name: str | None = None
) -> Path:
    """Sign every file of a sound bundle; return the signature's path.

    Args:
        folder: The bundle.
        key: Private key, PEM, on the curve P-256, P-384 or P-521.
        password: Of the key, if it has one.
        name: What the signature calls the bundle, of `subject_name`; None = nothing.

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
        files = _every_file(hashing)
        config.set_hashing_config(files if name is None else _Named(files, name))
        config.sign(folder.resolve(), temporary)
    return signature_path(folder)


def needs_password(key: Path) -> bool:
    """Return whether a private key is encrypted."""
    return key.is_file() and b"ENCRYPTED" in key.read_bytes()


class _Named:
    """A hashing configuration of the library whose manifests have a name that was chosen."""

    def __init__(self, files: Any, name: str) -> None:
        self._files, self.model_name = files, _SUBJECT + name

    def hash(self, path: Path) -> Any:
        self._manifest = self._files.hash(path)
        return self

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._manifest, attribute)


def check_signature(
    folder: Path, key: Path, signature: Path | None = None, *, expect: str | None = None
) -> Signed:
    """Check that every file of a folder is what the owner of a key signed; parses none of them.

    Args:
        folder: The bundle.
        key: Public key, PEM.
        signature: Default: `signature_path(folder)`.
        expect: NAME or NAME@VERSION that it must have been signed as; a name alone takes every
            version. None = whatever it was called.

    Returns:
        What the signature says; hold the bundle to it after opening (`Signed.require_same`).

    Raises:
        UserError: If there is no such folder, or the key cannot be used.
        VerificationError: If there is no signature, it is another key's, a file has changed, or it
            was signed under another name or version.
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
        raw = _read(place)
        with tempfile.TemporaryDirectory(prefix="mdpd-signature-") as scratch:
            own = Path(
                scratch, "signature"
            )  # what is checked and what is parsed are the same bytes
            own.write_bytes(raw)
            with contextlib.redirect_stdout(io.StringIO()):  # the library prints its warnings
                config.set_hashing_config(_every_file(hashing)).verify(folder.resolve(), own)
        name, digests = _statement(raw)
        unsigned = sorted(present - set(digests))
        if unsigned:
            raise ValueError(f"it leaves out {unsigned[0]}")
        signed = Signed(name, digests[FILE])
    except Exception as err:  # InvalidSignature, ValueError, KeyError, …
        raise VerificationError(
            f"the signature {place} does not fit bundle {folder} with the key {key} "
            f"({_reason(err)}); take a sound copy, or sign the bundle again."
        ) from err
    if expect is not None and expect not in (name, (name or "").partition("@")[0]):
        called = f"as {name}" if name else "without a name (`mdpd sign --name`)"
        raise VerificationError(f"bundle {folder} was signed {called}, not as {expect}.")
    return signed


def load_signed(
    folder: Path, key: Path | None, signature: Path | None = None, *, expect: str | None = None
) -> tuple[Bundle, Signed | None]:
    """Open a bundle whose signature is checked before anything in it is parsed.

    Args:
        folder: The bundle.
        key: Public key, PEM; None = no signature is asked for.
        signature: As in `check_signature`.
        expect: As in `check_signature`.

    Raises:
        UserError: If the folder is no sound bundle, or the key cannot be used.
        VerificationError: As `check_signature`.
    """
    if key is None:
        return load_bundle(folder), None
    signed = check_signature(folder, key, signature, expect=expect)
    bundle = load_bundle(folder)
    signed.require_same(folder, bundle.manifest)
    return bundle, signed


def _library(*, verify: bool = False) -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as err:
        raise missing_extra(err.name or "model_signing", "sign", "a signature") from err
    return (verifying if verify else signing), hashing


def _every_file(hashing: Any) -> Any:
    """By default the library leaves out the files of git."""
    return hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)


def _read(signature: Path) -> bytes:
    with signature.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError("it is too large")
    return raw


def _statement(signature: bytes) -> tuple[str | None, dict[str, str]]:
    """Return the name and the digests of files that a signature states; some may be left out."""
    statement = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    subject = str(statement["subject"][0]["name"])
    name = subject.removeprefix(_SUBJECT) if subject.startswith(_SUBJECT) else None
    resources = statement["predicate"]["resources"]
    return name, {resource["name"]: str(resource["digest"]) for resource in resources}


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
