"""Checks `files`, `schema` and `signature`: what was exported is there, and who vouches for it.

`load_bundle` refuses a bundle with a wrong file or schema, and `load_signed` one that another
key signed, before a check is done; here is said what they saw.
"""

from mdpd_deploy.artifacts.manifest import MODEL_FILE
from mdpd_deploy.artifacts.signing import signature_path
from mdpd_deploy.checks.subject import Seen, Subject


def recheck(subject: Subject) -> Seen:
    """`load_bundle` refuses a bundle where this does not hold; so this only says what it saw."""
    listed = {**subject.bundle.manifest["files"], **subject.bundle.manifest["caches"]}
    size = sum(entry["bytes"] for entry in listed.values())
    return Seen("passed", f"{len(listed)} files, {size / 1e6:.1f} MB: every SHA-256 as listed")


def recheck_schema(subject: Subject) -> Seen:
    """As `recheck`."""
    schema = subject.bundle.manifest["schema"]
    return Seen("passed", f"bundle schema {schema}; the notes inside {MODEL_FILE} agree")


def recheck_signature(subject: Subject) -> Seen:
    """Say whether somebody vouches for the bundle; a wrong signature was refused before."""
    if subject.signer is not None:
        return Seen("passed", f"signed by the owner of {subject.signer}")
    name = signature_path(subject.path).name
    if signature_path(subject.path).is_file():
        return Seen("not applicable", f"not checked: {name} is there, name the public key by --key")
    return Seen("not applicable", f"not signed: there is no {name}")
