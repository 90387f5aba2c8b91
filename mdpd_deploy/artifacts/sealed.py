"""The files of a bundle: listed last and checked first. No torch.

A bundle is accepted only whole: every file listed with its SHA-256, nothing else in the folder, no
symbolic or hard link (ONNX Runtime would follow one out of the bundle), external weights inside.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from mdpd_deploy.artifacts.manifest import (
    BASE,
    EXTERNAL_FILE,
    FILE,
    METADATA_PREFIX,
    MODEL,
    SCHEMA,
    Manifest,
    base_notes,
    graph_notes,
    upgraded,
)
from mdpd_deploy.errors import UserError, printable
from mdpd_deploy.files import Read, fsync_path, read_json, sha256_file, write_json

MAX_MANIFEST_BYTES = 16_000_000  # a real one has a few kB


def seal(folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` with the SHA-256 of every file in the folder; return the manifest."""
    listed = {n: _entry(folder / n) for n in sorted(list_files(folder)) if n != FILE}
    manifest = {"schema": SCHEMA, **plain, "caches": {}, "files": listed}
    Manifest.model_validate(manifest)
    write_json(folder / FILE, manifest)
    return manifest


def replace_caches(
    folder: Path, staging: Path, names: Sequence[str], engine: dict[str, str]
) -> None:
    """Move new caches into a bundle and list them; killed anywhere, it leaves a sound bundle.

    A bundle may lack a listed cache but holds no unlisted file. So the old ones go first, then the
    manifest lists the new ones, then they come.

    Args:
        folder: A sound bundle.
        staging: Where the new caches lie, on the same file system; the old manifest's others go.
        names: Their names.
        engine: The new `manifest.engine`.
    """
    plain = read_json(folder / FILE, "bundle")
    old = list(plain["caches"])
    plain |= {"engine": engine, "caches": {name: _entry(staging / name) for name in names}}
    Manifest.model_validate(upgraded(plain))
    write_json(staging / FILE, plain)
    for name in names:
        fsync_path(staging / name)
    for name in old:
        (folder / name).unlink(missing_ok=True)
    for name in (FILE, *names):
        os.replace(staging / name, folder / name)
    fsync_path(folder)


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def read_checked(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """Return the manifest of a bundle whose every byte is what was written, in today's schema.

    Raises:
        UserError: If the folder is no bundle, of another schema, or was changed; one sentence.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a bundle: give the folder that `mdpd export` wrote.")
    if not (folder / FILE).is_file():
        raise UserError(
            f"{folder} is not a bundle (it has no {FILE}): give the folder that `mdpd export` wrote."
        )
    present = set(list_files(folder))
    if (folder / FILE).stat().st_size > MAX_MANIFEST_BYTES:
        raise _changed(folder, f"{FILE} is larger than any that was exported")
    plain, manifest = _parse(folder, read_json(folder / FILE, "bundle"))
    caches = {name: entry for name, entry in manifest.caches.items() if name in present}
    listed = {**manifest.files, **caches}  # a cache that is gone can be built again
    _compare_names(folder, present - {FILE}, set(listed))
    for name, entry in listed.items():
        file = folder / name
        if file.stat().st_size != entry.bytes or sha256_file(file) != entry.sha256:
            raise _changed(folder, f"{name} is not the file that was exported")
    for name in manifest.needed:
        if name not in manifest.files:
            raise _changed(folder, f"{name} is not listed in {FILE}")
    return plain, manifest


def reader(folder: Path, plain: Mapping[str, Any]) -> Read:
    """Return what reads a bundle's files, each held to the digest in a manifest that was read.

    The bytes that are used are the bytes that were hashed: a file that is exchanged after the
    bundle was opened is refused, and one that is in memory is not touched by it.
    """

    def read(path: Path) -> bytes:
        name = path.relative_to(folder).as_posix()
        entry = _listed(folder, plain, name)
        try:
            with path.open("rb") as stream:
                raw = stream.read(entry["bytes"] + 1)
        except OSError as err:
            raise _changed(folder, f"{name} cannot be read ({err.strerror})") from err
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise _changed(folder, f"{name} is not the file that was exported")
        return raw

    return read


def copy_listed(folder: Path, plain: Mapping[str, Any], name: str, target: Path) -> None:
    """Copy a file out of a bundle; raises `UserError` unless the copy is what was exported."""
    entry = _listed(folder, plain, name)
    shutil.copyfile(folder / name, target)
    if sha256_file(target) != entry["sha256"]:
        raise _changed(folder, f"{name} is not the file that was exported")


def _listed(folder: Path, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] | None = plain["files"].get(name) or plain["caches"].get(name)
    if entry is None:
        raise _changed(folder, f"{name} is not listed in {FILE}")
    return entry


def check_graphs(folder: Path, manifest: Manifest, read: Read = Path.read_bytes) -> None:
    """Check that each graph's weights stay in the bundle and its ports and notes are the manifest's.

    Raises:
        UserError: If they do not.
    """
    notes = {MODEL: graph_notes(manifest.model_dump())}
    if manifest.tasks:
        notes[BASE] = base_notes(manifest)
    for graph in manifest.graphs:
        proto = _checked_proto(folder, graph.file, manifest, read)
        weights = {tensor.name for tensor in proto.graph.initializer}
        asked = [value for value in proto.graph.input if value.name not in weights]
        for ports, values in ((graph.inputs, asked), (graph.outputs, proto.graph.output)):
            if [(port.name, port.shape) for port in ports] != [_name_and_shape(v) for v in values]:
                raise _changed(folder, f"inputs or outputs of {graph.file} contradict {FILE}")
        if _notes(proto) != notes.get(graph.name, _notes(proto)):
            raise _changed(folder, f"the notes inside {graph.file} contradict {FILE}")


def _checked_proto(folder: Path, name: str, manifest: Manifest, read: Read) -> Any:
    """Return a graph without its weights; raises when one of them lies outside the bundle.

    Only a weight of the graph itself may lie in a file, and only in the one that is handed to the
    runtime with it: anything else the runtime would look up on the disk by itself.
    """
    import onnx

    from mdpd_deploy.graphs.signature import tensors_in

    try:
        proto = onnx.load_model_from_string(read(folder / name))
    except UserError:
        raise
    except Exception as err:  # protobuf's DecodeError is no stable import
        raise _changed(folder, f"{name} is not an ONNX file") from err
    own = [tensor for tensor in proto.graph.initializer if _is_external(tensor)]
    inner = [tensor for tensor in tensors_in(proto) if _is_external(tensor)]  # of nodes too
    for tensor in inner:
        if not _inside(tensor, manifest):
            raise _changed(folder, f"weight {tensor.name!r} lies outside the bundle's files")
    if len(inner) > len(own):
        raise _changed(folder, f"a node of {name} reads a file")
    return proto


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _notes(proto: Any) -> dict[str, str]:
    return {p.key: p.value for p in proto.metadata_props if p.key.startswith(METADATA_PREFIX)}


def _inside(tensor: Any, manifest: Manifest) -> bool:
    """Return whether a tensor's bytes are a part of the file of weights that the manifest lists."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    entry = manifest.files.get(EXTERNAL_FILE) if where.get("location") == EXTERNAL_FILE else None
    offset, length = where.get("offset", "0"), where.get("length", "0")
    numbers = all(number.isascii() and number.isdigit() for number in (offset, length))
    return entry is not None and numbers and int(offset[:20]) + int(length[:20]) <= entry.bytes


def _name_and_shape(value: Any) -> tuple[str, list[str | int]]:
    """Return a graph's input or output as `Port` says it."""
    return value.name, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def list_files(folder: Path) -> Iterator[str]:
    """Yield every file below `folder` by POSIX name; raises `UserError` for a link or device."""
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            relative = PurePosixPath(path.relative_to(folder)).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise _changed(folder, f"{relative} is a symbolic link")
            if name in folders:
                continue
            if not stat.S_ISREG(status.st_mode):
                raise _changed(folder, f"{relative} is not a regular file")
            if status.st_nlink > 1:
                raise _changed(folder, f"{relative} is a hard link")
            yield relative


def _parse(folder: Path, plain: Any) -> tuple[dict[str, Any], Manifest]:
    found = plain.get("schema") if isinstance(plain, dict) else None
    if not isinstance(found, str):
        raise UserError(f"{folder}/{FILE} is not a manifest of mdpd-deploy: export the run again.")
    if found.partition(".")[0] not in ("1", SCHEMA.partition(".")[0]):
        raise UserError(
            f"{folder} has bundle schema {found!r:.40}, this version reads {SCHEMA}: use the mdpd-deploy "
            "that wrote it, or export the run again."
        )
    try:
        today = upgraded(plain)
        return today, Manifest.model_validate(today)
    except (KeyError, TypeError) as err:
        raise _changed(folder, f"{FILE} is damaged ({err!r:.60})") from None
    except ValidationError as err:
        problem = err.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise _changed(folder, f"{FILE} is damaged at {field!r} ({problem['msg']})") from None


def _compare_names(folder: Path, present: set[str], listed: set[str]) -> None:
    missing, extra = sorted(listed - present), sorted(present - listed)
    if missing:
        raise _changed(folder, f"{missing[0]} is missing")
    if extra:
        raise _changed(folder, f"{extra[0]} is not listed in {FILE}")


def _changed(folder: Path, what: str) -> UserError:
    return UserError(
        f"bundle {folder}: {printable(what)}; take a sound copy or export the run again."
    )
