"""Checks `labels` and `preprocessing`: inputs and outputs mean what they meant at export."""

from mdpd_deploy.artifacts.tasks import meaning_of
from mdpd_deploy.checks.subject import Seen, Subject
from mdpd_deploy.errors import VerificationError

_BEFORE = "exported before digests of {} were kept"


def recheck_labels(subject: Subject) -> Seen:
    """Class names in their order, kind and name of the task have the digest of the export."""
    record, task = subject.certificate.meaning, subject.task
    if record is None:
        return Seen("recorded", _BEFORE.format("the class names"))
    if _digests(subject)["outputs_sha256"] != record.outputs_sha256:
        raise VerificationError("name, kind or class names of the task are not those of the export")
    return Seen("passed", f"{task.task.words}, as exported")


def recheck_preprocessing(subject: Subject) -> Seen:
    """Settings and tokenizer have the digests of the export."""
    record = subject.certificate.meaning
    if record is None:
        return Seen("recorded", _BEFORE.format("preprocessing and tokenizer"))
    found = _digests(subject)
    if found["preprocessing_sha256"] != record.preprocessing_sha256:
        raise VerificationError("the settings of the preprocessing are not those of the export")
    if found["tokenizer_sha256"] != record.tokenizer_sha256:
        raise VerificationError("the tokenizer is not the one that was exported")
    what = "settings" if record.tokenizer_sha256 is None else "settings and tokenizer"
    return Seen("passed", f"{what} as exported")


def _digests(subject: Subject) -> dict[str, str | None]:
    bundle, task = subject.bundle, subject.task
    name = task.name if bundle.mixed else None
    return meaning_of(bundle.path, task.facts, name, bundle.read)
