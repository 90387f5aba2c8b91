"""Let every single call that writes fail once, in `mdpd train`, `export` and `sign`, and look.

    python benchmarks/faults.py                 # every n-th call of every kind
    python benchmarks/faults.py --every 5       # every fifth

A tiny vision transformer is trained for two steps, exported and signed. Each verb is first run to
count its calls below a folder of its own: opening (EMFILE), writing (ENOSPC, also of tensors),
fsync (EIO), renaming (EIO), making a folder (ENOSPC), forking (EAGAIN). Then it is run again and
again with the n-th of them failing; no device or file outside of that folder is touched. Allowed is exit code 1 or 2 with one sentence and
nothing half-written, after which the same command succeeds; or success, with a sound result.
"""

import argparse
import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors import SafetensorError

from mdpd_deploy.cli import main as mdpd
from mdpd_deploy.errors import MdpdError

KINDS = {
    "open": errno.EMFILE, "write": errno.ENOSPC, "tensors": errno.ENOSPC, "fsync": errno.EIO,
    "rename": errno.EIO, "mkdir": errno.ENOSPC, "fork": errno.EAGAIN,
}  # fmt: skip
Check = Callable[[Path], str | None]


@dataclass
class Faults:
    """Counts the calls below a folder, and fails the n-th of a kind.

    Attributes:
        root: Only what touches paths below it counts.
        kind: Which kind fails; None for none.
        nth: Which one of them, from 1.
        calls: How many there were, by kind.
    """

    root: Path
    kind: str | None = None
    nth: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def due(self, kind: str, path: object = None) -> bool:
        """Count a call and say whether it is the one that fails."""
        if path is not None and not self._below(path):
            return False
        self.calls[kind] += 1
        return kind == self.kind and self.calls[kind] == self.nth

    def _below(self, path: object) -> bool:
        if isinstance(path, int):  # a descriptor
            path = os.readlink(f"/proc/self/fd/{path}")
        return os.path.abspath(os.fspath(path)).startswith(f"{self.root}/")  # type: ignore[call-overload]

    def fail(self, kind: str, path: object = None) -> None:
        """Raise the error of a kind where it is due."""
        if self.due(kind, path):
            code = KINDS[kind]
            name = path if isinstance(path, str | Path) else None
            raise OSError(code, os.strerror(code), name and str(name))

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """Count and fail in the block."""
        opened, os_opened, serialised = io.open, os.open, _serialiser()

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            self.fail("open", file)
            if set(mode) & set("wax+") and self.due("write", file):
                return _stream_on_full_disk(file, mode)
            return opened(file, mode, *args, **kwargs)

        def os_open(path: Any, *args: Any, **kwargs: Any) -> int:
            self.fail("open", path)
            return os_opened(path, *args, **kwargs)

        def serialise(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            if self.due("tensors", filename):
                Path(filename).write_bytes(b"half")  # as a disk that fills up may leave it
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            serialised(tensors, filename, *args, **kwargs)

        def before(kind: str, function: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                self.fail(kind, args[-1] if kind == "rename" else args[0] if args else None)
                return function(*args, **kwargs)

            return called

        with contextlib.ExitStack() as stack:
            for owner, name, made in (
                (builtins, "open", open_), (io, "open", open_), (os, "open", os_open),
                (sys.modules["safetensors.torch"], "serialize_file", serialise),
                (os, "fsync", before("fsync", os.fsync)),
                (os, "replace", before("rename", os.replace)),
                (os, "rename", before("rename", os.rename)),
                (os, "mkdir", before("mkdir", os.mkdir)),
                (os, "fork", before("fork", os.fork)),
            ):  # fmt: skip
                stack.enter_context(patch.object(owner, name, made))
            stack.enter_context(patch.object(tempfile, "tempdir", str(self.root / "tmp")))
            yield


class _FullDisk(io.FileIO):
    """A file that can be made and not written to."""

    def write(self, data: Any, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stream_on_full_disk(file: Any, mode: str) -> Any:
    """Return what `open` would; its buffer fails when it is flushed or closed."""
    buffer = io.BufferedWriter(_FullDisk(file, mode.replace("b", "").replace("t", "").strip("+")))
    return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding="utf-8")


def _serialiser() -> Any:
    import safetensors.torch

    return safetensors.torch.serialize_file


@dataclass(frozen=True)
class Trial:
    """A verb to put to the test.

    Attributes:
        name: For the table.
        words: What to call, `{out}` standing for where it writes.
        again: What to call after a failure; may differ where the first one left a beginning.
        sound: Says what is wrong with a result, None if nothing is.
        nothing: Says what half of a result was left after a failure.
        given: Copied to where it writes before each call.
    """

    name: str
    words: tuple[str, ...]
    again: Callable[[Path], tuple[str, ...]]
    sound: Check
    nothing: Check
    given: Path | None = None


def call(words: tuple[str, ...], out: Path) -> tuple[int, list[str]]:
    """Run a verb here; return its exit code and what it said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = mdpd([word.format(out=out, root=out.parent) for word in words])
    return code, [line for line in said.getvalue().splitlines() if line]


def attempt(
    trial: Trial, root: Path, kind: str | None, nth: int
) -> tuple[str | None, Counter[str]]:
    """Run a verb with one fault; return what was wrong with how it ended, and its calls."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "tmp").mkdir(parents=True)
    out = root / "out"
    if trial.given is not None:
        shutil.copytree(trial.given, root / "given")
    faults = Faults(root, kind, nth)
    with faults.injected():
        code, said = call(trial.words, out)
    return _verdict(trial, out, code, said), faults.calls


def _verdict(trial: Trial, out: Path, code: int, said: list[str]) -> str | None:
    if code == 0:
        return trial.sound(out)
    errors = [line for line in said if "rror" in line]
    if code not in (1, 2) or not errors or not errors[-1].startswith("error: "):
        return f"exit code {code}: {errors[-1:] or said[-1:]}"
    left = [str(path) for path in out.parent.rglob(".*.tmp")] or trial.nothing(out)
    if left:
        return f"left behind: {left}"
    code, said = call(trial.again(out), out)
    return f"the next try: {said[-1:]}" if code else trial.sound(out)


# --- the verbs -----------------------------------------------------------------------------------


def train_trial(backbone: Path, pictures: Path) -> Trial:
    """Two steps with an evaluation and a checkpoint after each, by a loader process."""
    words = ("train", "--task", "classify", "--data", str(pictures), "--backbone", str(backbone),
             "--steps", "2", "--batch", "8", "--set", "train.eval_every=1",
             "--set", "data.workers=1", "--out", "{out}")  # fmt: skip

    def again(out: Path) -> tuple[str, ...]:
        begun = (out / "config.yaml").is_file()
        return ("train", "--resume", "{out}") if begun else words

    def sound(out: Path) -> str | None:
        from mdpd_deploy.artifacts.run import Run

        Run.open(out).load_with_side()
        return None

    def nothing(out: Path) -> str | None:
        return "summary.json" if (out / "summary.json").exists() else None

    return Trial("train", words, again, sound, nothing)


def export_trial(run: Path) -> Trial:
    """A bundle with every gate."""
    words = ("export", str(run), "--out", "{out}")
    return Trial("export", words, lambda out: (*words, "--overwrite"), _bundle_trouble, _half)


def sign_trial(bundle: Path, key: Path) -> Trial:
    """A signature beside a bundle."""
    words = ("sign", "{root}/given", "--key", str(key))

    def sound(out: Path) -> str | None:
        from mdpd_deploy.artifacts.signing import check_signature

        check_signature(out.parent / "given", key.with_name("public.pem"))
        return None

    def nothing(out: Path) -> str | None:
        left = [path.name for path in out.parent.iterdir() if path.name not in ("given", "tmp")]
        return f"{left}" if left else _bundle_trouble(out.parent / "given")

    return Trial("sign", words, lambda out: words, sound, nothing, given=bundle)


def _bundle_trouble(bundle: Path) -> str | None:
    from mdpd_deploy import load_bundle

    load_bundle(bundle)
    return None


def _half(out: Path) -> str | None:
    """A whole bundle may be there: where what follows its last rename has failed."""
    try:
        return _bundle_trouble(out) if out.exists() else None
    except MdpdError as err:
        return str(err)


# --- the table -----------------------------------------------------------------------------------


def survey(trial: Trial, root: Path, every: int) -> dict[str, Any]:
    """Count a verb's calls, fail each of them in turn, and return calls and troubles by kind."""
    trouble, calls = attempt(trial, root, None, 0)
    troubles = [trouble] if trouble else []
    tried = Counter[str]()
    for kind in KINDS:
        for nth in range(1, calls[kind] + 1, every):
            tried[kind] += 1
            found, _ = attempt(trial, root, kind, nth)
            if found:
                troubles.append(f"{trial.name}, {kind} {nth}: {found}")
                print(troubles[-1], file=sys.stderr, flush=True)
    return {"verb": trial.name, "calls": dict(calls), "tried": dict(tried), "troubles": troubles}


def write_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Write a tiny backbone, pictures and a pair of keys; return their places."""
    import timm
    import torch
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from PIL import Image
    from safetensors.torch import save_file

    backbone, pictures, keys = folder / "vit", folder / "pictures", folder / "keys"
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    backbone.mkdir(parents=True)
    save_file(model.state_dict(), backbone / "model.safetensors")
    plain = {"timm_model": "vit_tiny_patch16_224", "timm_kwargs": {**shape, "num_classes": 0}}
    (backbone / "config.json").write_text(json.dumps(plain))
    for split, count in (("train", 8), ("validation", 4)):
        for label in range(2):
            (pictures / split / f"c{label}").mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", (16, 16), (127 * label, 9 * index, 50))
                picture.save(pictures / split / f"c{label}" / f"{index}.png")
    keys.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key()
    (keys / "private.pem").write_bytes(private)
    (keys / "public.pem").write_bytes(
        public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return backbone, pictures, keys / "private.pem"


def main() -> None:
    """Print the table as JSON; exit code 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="fail only every so-many-th call")
    parser.add_argument("--verbs", default="train,export,sign")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        backbone, pictures, key = write_inputs(folder)
        first = train_trial(backbone, pictures)
        assert call(first.words, folder / "run")[0] == 0
        assert call(("export", str(folder / "run"), "--out", "{out}"), folder / "bundle")[0] == 0
        trials = (first, export_trial(folder / "run"), sign_trial(folder / "bundle", key))
        wanted = options.verbs.split(",")
        rows = [
            survey(trial, folder / "work", options.every)
            for trial in trials
            if trial.name in wanted
        ]
    print(json.dumps(rows, indent=2))
    sys.exit(any(row["troubles"] for row in rows))


if __name__ == "__main__":
    main()
