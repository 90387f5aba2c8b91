"""Checks a bundle again from what it holds, without the run, the backbone or torch.

Each gate has a file beside this one: `prove` is asked at an export, `recheck` here, from a `Subject`
to what was `Seen`; both raise when they fail. A new one gets a line in a table below.

files       every file is the one that the manifest lists
schema      the manifest can be read, and the graph's own notes agree with it
signature   the files are those that the owner of a key signed
graph       its operators and weights have the digests of the export
labels      class names, kind and name of the task have the digest of the export
preprocessing  its settings and the tokenizer have the digests of the export
side_free   no tensor of a side network, no weight that nothing reads
identity    node for node the bare backbone's graph; with the bare norms put back, its weights too
parameters  as many numbers as backbone and head have
parity      the record of the comparison with PyTorch is sound
golden      raw inputs give the stored outputs
metric      the task metric is the recorded one, where the data is at hand
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mdpd_deploy.checks import files, golden, identity, meaning, metric, parity, side_free
from mdpd_deploy.checks.subject import SOUND, Seen, Subject, Verdict
from mdpd_deploy.errors import MdpdError, VerificationError, printable

__all__ = [
    "OF_A_TASK",
    "OF_THE_BUNDLE",
    "SOUND",
    "Check",
    "Seen",
    "Subject",
    "Verdict",
    "require_sound",
    "verify",
]

Checks = dict[str, Callable[[Subject], Seen]]  # in the order in which they are done

OF_THE_BUNDLE: Checks = {
    "files": files.recheck,
    "schema": files.recheck_schema,
    "signature": files.recheck_signature,
    "graph": identity.recheck_graph,
    "side_free": side_free.recheck,
    "identity": identity.recheck,
    "parameters": side_free.recheck_parameters,
}
OF_A_TASK: Checks = {
    "labels": meaning.recheck_labels,
    "preprocessing": meaning.recheck_preprocessing,
    "parity": parity.recheck,
    "golden": golden.recheck,
    "metric": metric.recheck,
}


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        name: As in the table above.
        verdict: `passed`; `recorded`: true at export and not checked again; `not applicable`;
            `not recorded`: the bundle is too old to be checked; `not run`; `failed`.
        note: What was seen.
    """

    name: str
    verdict: Verdict
    note: str


def verify(subject: Subject) -> list[Check]:
    """Do every check, those of a task for each; none of them ends the others."""
    checks = [_do(name, check, subject) for name, check in OF_THE_BUNDLE.items()]
    for task in subject.bundle.tasks:
        one = replace(subject, asked=task)
        of = f" of {task.name}" if subject.bundle.mixed else ""
        checks += [_do(name + of, check, one) for name, check in OF_A_TASK.items()]
    return checks


def require_sound(checks: list[Check]) -> None:
    """Raise `VerificationError` when a check did not pass."""
    unsound = [check for check in checks if check.verdict not in SOUND]
    if unsound:
        raise VerificationError("; ".join(f"{check.name}: {check.note}" for check in unsound))


def _do(name: str, check: Callable[[Subject], Seen], subject: Subject) -> Check:
    try:
        seen = check(subject)
    except MdpdError as err:
        seen = Seen("failed", str(err))
    if seen.verdict == "failed":
        subject.failed.add(name)
    return Check(name, seen.verdict, printable(seen.note)[:500])
