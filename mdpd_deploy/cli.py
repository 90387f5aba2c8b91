"""The `mdpd` command: one list of verbs, each loaded only when it is used.

`mdpd --help` shows the list below without importing a verb, so it costs little more than importing
typer and rich. `main` is the one place that turns exceptions into words and exit codes:

    0    done
    1    the work failed (a gate, divergence, the disk, or a bug of ours)
    2    bad usage or bad input
    130  interrupted
    143  ended by SIGTERM, as schedulers do
"""

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Abort, TyperException

from mdpd_deploy.errors import MdpdError
from mdpd_deploy.text import shown


class Verb(NamedTuple):
    """A word of the command line: where its function lives, and its line in `mdpd --help`."""

    module: str
    function: str
    help: str


VERBS = {
    "train": Verb("train", "command", "Fine-tune a model and write a run folder."),
    "eval": Verb("evaluate", "command", "Measure a run or a bundle on data."),
    "recipes": Verb("recipes", "command", "List the papers' protocols, for --recipe."),
    "compare": Verb("compare", "command", "Train methods on the same data, side by side."),
    "export": Verb("export", "command", "Drop the side network; write a verified bundle."),
    "verify": Verb("verify", "command", "Check a bundle again from what it holds."),
    "sign": Verb("sign", "command", "Sign a bundle with a key, offline."),
    "build-engine": Verb("build_engine", "command", "Build a bundle's TensorRT engine here."),
    "bench-latency": Verb("bench_latency", "command", "Time a model against its rivals."),
    "predict": Verb("predict", "command", "Predict with a bundle on images, texts or a table."),
    "serve": Verb("serve", "command", "Serve bundles over HTTP."),
    "triton": Verb("triton", "command", "Write a model repository for Triton from bundles."),
    "demo": Verb("demo", "command", "Train, export and time a small model, offline."),
    "doctor": Verb("doctor", "command", "Check this machine, and say how to mend it."),
}

# Read by libraries when they are imported; a value that the user has set stays.
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
INTERRUPTED = 130
_ENDED = {INTERRUPTED: "interrupted", 143: "terminated"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MACHINE = {  # what fails in the machine and not in us, and the mend
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "Close other programs",
    errno.EAGAIN: "Close other programs or raise the limit on processes (`ulimit -u`)",
    errno.EIO: "Check the disk or the connection to it",
    errno.ESTALE: "Check the connection to the disk",
    errno.EACCES: "Check who may use it",
    errno.EPERM: "Check who may use it",
    errno.EROFS: "Choose another place",
}
_ERROR_LINES = 12


class _LazyCommand(TyperCommand):
    """A verb's line in the help; the verb itself is imported when it is called."""

    def __init__(self, name: str, verb: Verb) -> None:
        super().__init__(name, help=verb.help)
        self._verb = verb

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        return self._load().make_context(info_name, args, *rest, **extra)

    def _load(self) -> TyperCommand:
        module = import_module(f"mdpd_deploy.commands.{self._verb.module}")
        inner = typer.Typer(add_completion=False, rich_markup_mode=None)
        inner.command(self.name)(getattr(module, self._verb.function))
        command = typer.main.get_command(inner)
        assert isinstance(command, TyperCommand)
        return command


class _Group(TyperGroup):
    """The top of the command line, with the verbs in the order of `VERBS`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, verb in VERBS.items():
            self.add_command(_LazyCommand(name, verb))


app = typer.Typer(cls=_Group, add_completion=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mdpd-deploy {version('mdpd-deploy')}")
        raise typer.Exit


@app.callback()
def _top(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tune an encoder with a side network that fades; deploy only the backbone.

    Start with `mdpd demo`, or `mdpd VERB --help` for one verb.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for what a user can cause.

    Args:
        arguments: The words after `mdpd`; default: those of this process. `--debug` may stand
            anywhere before a bare `--`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug, words = _take_debug(words)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _any_text(), _messages(debug=debug):
        return _run(words, debug=debug)


def _run(words: list[str], *, debug: bool) -> int:
    try:
        command = typer.main.get_command(app)
        code = command.main(words or ["--help"], prog_name="mdpd", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except Exception as err:  # noqa: BLE001 - the last door: every exception becomes words
        if debug:
            traceback.print_exc()
        code, message = _explain(err)
        if message:
            _say(message)
    if code in _ENDED:
        _say(_ENDED[code])
    return code if isinstance(code, int) else int(code is not None)


def _take_debug(words: list[str]) -> tuple[bool, list[str]]:
    """Find `--debug` before a bare `--`, so that it works before and after the verb."""
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word != "--debug"]
    return len(options) < end, options + words[end:]


class _Shown(logging.Formatter):
    """Messages as a terminal may have them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


@contextlib.contextmanager
def _any_text() -> Iterator[None]:
    """Print what a terminal's encoding lacks as an escape, as `caf\\xe9`, instead of failing on it."""
    before = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            before.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _messages(*, debug: bool) -> Iterator[None]:
    """Show our own messages on stderr, and those of libraries only with `--debug`."""
    root, ours = logging.getLogger(), logging.getLogger("mdpd_deploy")
    before = root.level, ours.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Shown())
    root.addHandler(handler)
    root.setLevel(logging.WARNING if debug else logging.ERROR)
    ours.setLevel(logging.DEBUG if debug else logging.INFO)
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(before[0])
            ours.setLevel(before[1])


def _explain(err: Exception) -> tuple[int, str]:
    """Return the exit code and the words for an exception that escaped a verb."""
    if isinstance(err, MdpdError):
        return err.exit_code, f"error: {err}"
    if isinstance(err, TyperException):
        return err.exit_code, f"error: {_sentence(err.format_message())}{_usage_hint(err)}"
    if isinstance(err, BrokenPipeError):  # the reader of our output went away, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at exit
        return 1, ""
    if isinstance(err, OSError) and err.errno in _DISK_FULL:
        where = f" {err.filename}" if err.filename else ""
        return 1, f"error: could not write{where}: {err.strerror}. Free some space and try again."
    if isinstance(err, OSError) and err.errno in _MACHINE:
        where = f"could not use {err.filename}" if err.filename else "the system refused"
        return 1, f"error: {where}: {err.strerror}. {_MACHINE[err.errno]} and try again."
    if _is_out_of_memory(err):
        return (
            1,
            "error: out of memory. Use a smaller --batch; `mdpd train --dry-run` forecasts it.",
        )
    reason = (str(err).strip().splitlines() or [""])[0][:300]
    return 1, (
        f"internal error: {type(err).__name__}: {_sentence(reason)} "
        "This is a bug of mdpd-deploy; add --debug to see where."
    )


def _is_out_of_memory(err: Exception) -> bool:
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
        return True
    return isinstance(err, RuntimeError) and "can't allocate memory" in str(err)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _usage_hint(err: TyperException) -> str:
    context = getattr(err, "ctx", None)
    return f" Try `{context.command_path} --help`." if context is not None else ""


def _say(message: str) -> None:
    """Print at most `_ERROR_LINES` lines on stderr."""
    lines = shown(message).splitlines()
    if len(lines) > _ERROR_LINES:
        lines = [*lines[: _ERROR_LINES - 1], "..."]
    print("\n".join(lines), file=sys.stderr, flush=True)
