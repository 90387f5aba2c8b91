"""The frame of the command line: help, exit codes, words on stderr, doctor."""

import errno
import importlib
import json
import logging
import subprocess
import sys
import types
import warnings

import pytest

from mdpd_deploy import cli
from mdpd_deploy.commands import doctor
from mdpd_deploy.errors import ExportError, UserError, VerificationError, WorkFailed

# Counted as modules, not seconds: what typer and rich import to print any help.
BASELINE = """
import sys, typer
app = typer.Typer()
@app.callback()
def top(flag: bool = False): "Help."
@app.command()
def verb(number: int = 1): "Help."
try:
    app(["--help"])
finally:
    print(len(sys.modules), file=sys.stderr)
"""
HELP = """
import sys
from mdpd_deploy.cli import main
for verb in sys.argv[1:] or [None]:
    assert main([verb, "--help"] if verb else ["--help"]) == 0
print(*sys.modules, file=sys.stderr)
"""
HEAVY = {
    "torch",
    "omegaconf",
    "numpy",
    "yaml",
    "timm",
    "transformers",
    "onnx",
    "mdpd_deploy.config",
}


@pytest.fixture
def verb(monkeypatch):
    """Add a verb that does what the test wants."""

    def add(body):
        def command() -> None:
            return body()

        module = types.ModuleType("mdpd_deploy.commands.trial")
        module.command = command
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.VERBS, "trial", cli.Verb("trial", "command", "A trial."))

    return add


def test_help_lists_every_verb_and_loads_none(tmp_path, run_python):
    baseline = int(run_python("-c", BASELINE, cwd=tmp_path).stderr.split()[-1])
    done = run_python("-c", HELP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, verb in cli.VERBS.items():
        assert name in done.stdout
        assert verb.help.split()[0] in done.stdout
    loaded = set(done.stderr.split())
    assert not loaded & (HEAVY | {"pydantic"})
    assert not [name for name in loaded if name.startswith("mdpd_deploy.commands.")]
    assert len(loaded) <= 2 * baseline


def test_the_verbs_own_help_loads_nothing_heavy(tmp_path, run_python):
    done = run_python("-c", HELP, *cli.VERBS, cwd=tmp_path)  # typer itself loads pydantic here
    assert done.returncode == 0, done.stderr
    assert [f"mdpd {name} " in done.stdout for name in cli.VERBS] == [True] * len(cli.VERBS)
    assert not set(done.stderr.split()) & HEAVY


@pytest.mark.parametrize("verb", cli.VERBS.values(), ids=list(cli.VERBS))
def test_every_verb_says_what_it_does(verb):
    command = getattr(importlib.import_module(f"mdpd_deploy.commands.{verb.module}"), verb.function)
    assert (command.__doc__ or "").strip()
    assert verb.help.endswith(".")


def test_without_words_the_help_is_shown(capsys):
    assert cli.main([]) == 0
    assert "bench-latency" in capsys.readouterr().out


def test_version(capsys):
    import mdpd_deploy

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mdpd-deploy {mdpd_deploy.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("--fmt nope: choose onnx."), 2, "error: --fmt nope: choose onnx."),
        (WorkFailed("it diverged."), 1, "error: it diverged."),
        (ExportError("not traced."), 1, "error: not traced."),
        (VerificationError("gate 2."), 1, "error: gate 2."),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            "error: could not write /x/y: No space left on device. Free some space and try again.",
        ),
        (
            KeyError("side"),
            1,
            "internal error: KeyError: 'side'. "
            + "This is a bug of mdpd-deploy; add --debug to see where.",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_words_and_exit_codes(verb, capsys, error, code, words):
    def fail():
        raise error

    verb(fail)
    assert cli.main(["trial"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", words + "\n")


@pytest.mark.parametrize("words", [["--debug", "trial"], ["trial", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(verb, capsys, words):
    def fail():
        raise UserError("a mend.")

    verb(fail)
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: a mend.\n")


def test_debug_after_two_dashes_is_a_word_like_any_other():
    assert cli._take_debug(["predict", "--", "--debug"]) == (False, ["predict", "--", "--debug"])
    assert cli._take_debug(["predict", "--debug", "--"]) == (True, ["predict", "--"])


def test_interrupted(verb, capsys):
    def interrupt():
        raise KeyboardInterrupt

    verb(interrupt)
    assert cli.main(["trial"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_a_long_error_is_cut_to_twelve_lines(verb, capsys):
    def fail():
        raise UserError("\n".join(f"line {number}" for number in range(40)))

    verb(fail)
    assert cli.main(["trial"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert lines[0] == "error: line 0"


def test_library_warnings_are_silent_and_ours_are_not(tmp_path, run_python):
    script = """
import logging, sys, types, warnings
from mdpd_deploy import cli
def command() -> None:
    warnings.warn("noise of a library", UserWarning)
    logging.getLogger("some.library").warning("noise of a logger")
    logging.getLogger("mdpd_deploy.trial").info("ours")
module = types.ModuleType("mdpd_deploy.commands.trial")
module.command = command
sys.modules[module.__name__] = module
cli.VERBS["trial"] = cli.Verb("trial", "command", "A trial.")
sys.exit(cli.main(sys.argv[1:]))
"""
    assert run_python("-c", script, "trial", cwd=tmp_path).stderr == "ours\n"
    assert run_python("-c", script, "trial", "--debug", cwd=tmp_path).stderr.count("noise") >= 2


def test_the_callers_warnings_and_logging_are_left_as_they_were(verb):
    verb(lambda: None)
    before = list(logging.getLogger().handlers), logging.getLogger().level, list(warnings.filters)
    assert cli.main(["trial"]) == 0
    assert before == (logging.getLogger().handlers, logging.getLogger().level, warnings.filters)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?"),
        (["--nope"], "No such option: --nope"),
        (["train", "--stepz", "3"], "--steps"),
        (["train", "--steps", "many"], "'--steps'"),
        (["train", "absent.yaml"], "the config file absent.yaml does not exist"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_reaches_the_shell(tmp_path, run_python):
    done = run_python("-m", "mdpd_deploy", "train", "absent.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_causes_no_traceback(tmp_path):
    shell = f"'{sys.executable}' -m mdpd_deploy --help | true"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


@pytest.fixture
def users_folder(tmp_path):
    """A folder whose scripts bear the names of our folders and modules."""
    for name in ("train", "export", "serve", "cli", "config", "model", "run"):
        (tmp_path / f"{name}.py").write_text("WHOSE = 'the user'\n")
    return tmp_path


@pytest.mark.slow
def test_python_m_works_beside_the_users_own_scripts(users_folder, run_python):
    done = run_python(
        *("-m", "mdpd_deploy", "compare", "--forecast", "--methods", "probe", "--json"),
        cwd=users_folder,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["forecast"]["peak_bytes"] > 0


def test_users_scripts_keep_their_names(users_folder, run_python):
    (users_folder / "work.py").write_text(
        "import train, export, serve\n"
        "assert {train.WHOSE, export.WHOSE, serve.WHOSE} == {'the user'}\n"
        "import mdpd_deploy.train, mdpd_deploy.export, mdpd_deploy.serve\n"
        "for area in ('train', 'export', 'serve'):\n"
        "    assert getattr(mdpd_deploy, area).__name__ == 'mdpd_deploy.' + area\n"
        "    assert not hasattr(getattr(mdpd_deploy, area), 'WHOSE')\n"
    )
    done = run_python("work.py", cwd=users_folder)
    assert done.returncode == 0, done.stderr


def test_doctor_finds_this_environment_sound(tmp_path, run_python):
    done = run_python("-m", "mdpd_deploy", "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    found = {(check["area"], check["name"]): check for check in report["checks"]}
    assert found["versions", "torch"]["state"] == "ok"
    assert found["runs", "newest run"]["state"] == "absent"
    assert found["runs", "newest run"]["mend"]
    assert {area for area, _ in found} == {"versions", "devices", "extras", "folders", "runs"}
    for check in report["checks"]:
        assert check["state"] == "ok" or check["mend"]


def test_doctor_names_what_fails_and_the_mend(tmp_path, run_python):
    done = run_python("-m", "mdpd_deploy", "doctor", cwd=tmp_path, HF_HOME="/proc/nobody/writes")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (place,) = [number for number, line in enumerate(lines) if "PROBLEM" in line]
    assert "downloaded models" in lines[place]
    assert "mend: set HF_HOME" in lines[place + 1]
    assert lines[-1].startswith("1 problem")


def test_doctor_compares_versions_with_what_is_asked_for():
    from packaging.requirements import Requirement

    assert doctor._package("versions", Requirement("typer>=0.1")).state == "ok"
    old = doctor._package("versions", Requirement("typer>=999"))
    assert (old.state, old.mend) == ("problem", 'pip install "typer>=999"')
    missing = doctor._package("versions", Requirement("no-such-package-of-ours>=1"))
    assert (missing.state, missing.found) == ("problem", "missing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "{list}"], "must hold `name: value` lines"),
        (["train", "--seed", "9" * 25], "train.seed"),
        (["train", "--set", "train=3", "--steps", "2"], "option train:"),
    ],
)
def test_odd_configs_are_one_sentence_and_exit_2(words, said, tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    words = [word.format(list=tmp_path / "list.yaml") for word in words]
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert said in printed and len(printed.splitlines()) == 1


def test_a_refused_allocation_is_out_of_memory(verb, capsys):
    def command() -> None:
        import torch

        torch.empty(1 << 60)

    verb(command)
    assert cli.main(["trial"]) == 1
    assert "out of memory" in capsys.readouterr().err


ODD = "caf\u00e9 \u4f60\u597d \U0001f600 \udce9"  # the last: a byte of an argument that is no UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_text_can_be_printed_on_any_terminal(encoding, tmp_path, run_python):
    """On both streams, by print, typer, rich, logging and our own errors."""
    script = f"""
import logging, sys, types, typer
from rich.console import Console
from rich.table import Table
from mdpd_deploy import cli
from mdpd_deploy.errors import UserError
def command() -> None:
    text = {ODD!a}
    print(text)
    typer.echo(text)
    table = Table(title=text)
    table.add_row(text)
    Console().print(table)
    logging.getLogger("mdpd_deploy.trial").info(text)
    raise UserError(text + "\u2026")
module = types.ModuleType("mdpd_deploy.commands.trial")
module.command = command
sys.modules[module.__name__] = module
cli.VERBS["trial"] = cli.Verb("trial", "command", "A trial.")
code = cli.main(["trial"])
assert sys.stdout.errors == "strict"
sys.exit(code)
"""
    done = run_python("-c", script, cwd=tmp_path, PYTHONIOENCODING=encoding + ":strict")
    assert done.returncode == 2, done.stderr
    assert "internal error" not in done.stderr and "error: caf" in done.stderr
    assert done.stdout.count("caf") == 4
    if encoding == "ascii":
        assert r"caf\xe9 \u4f60\u597d \U0001f600 \udce9" in done.stdout


def test_predictions_are_printed_on_any_terminal(tiny_text_bundle, tmp_path, run_python):
    words = (
        "-m",
        "mdpd_deploy",
        "predict",
        str(tiny_text_bundle.path),
        "caf\u00e9 \U0001f600 good",
    )
    table = run_python(*words, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert table.returncode == 0 and r"caf\xe9" in table.stdout, table.stderr
    plain = run_python(*words, "--json", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert json.loads(plain.stdout)["predictions"][0]["input"] == words[-1]


@pytest.mark.parametrize(
    "value",
    ["${oc.env:SECRET}", "${oc.env:NONE,${oc.env:SECRET}}", "a${${train.how}:SECRET}",
     "${ oc.env : SECRET }", "${oc.decode:'[1]'}", "[1, {a: '${oc.env:SECRET}'}]"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["out: {}", "data: {}", "data:\n  labels: [{}]"])
def test_a_config_reads_nothing_from_its_surroundings(value, place, tmp_path, monkeypatch, capsys):
    """A stranger's file must not bring a secret of ours into config.yaml, report or messages."""
    monkeypatch.setenv("SECRET", "hunter2")
    quoted = value if value[0] == "[" else json.dumps(value)
    (tmp_path / "c.yaml").write_text(place.format(quoted) + "\n")
    words = ["train", str(tmp_path / "c.yaml"), "--set", "data.limit=5", "--dry-run"]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert "c.yaml" in err and "asks for more than another option" in err
    assert len(err.splitlines()) == 1 and "hunter2" not in out + err


def test_an_option_may_still_refer_to_another(tmp_path):
    from mdpd_deploy.config import load_config

    (tmp_path / "c.yaml").write_text("train: {batch: 4, eval_batch: '${.batch}'}\n")
    assert load_config(tmp_path / "c.yaml").train.eval_batch == 4
    assigned = ["train.batch=4", "train.eval_batch=${train.batch}"]
    assert load_config(sets=assigned).train.eval_batch == 4
    with pytest.raises(UserError, match=r"^--set: .*asks for more than another option"):
        load_config(sets=["out=${oc.env:HOME}"])


@pytest.mark.parametrize(
    ("number", "mend"),
    [("EMFILE", "ulimit -n"), ("EIO", "Check the disk"), ("EAGAIN", "ulimit -u")],
)
def test_what_fails_in_the_machine_is_no_bug_of_ours(verb, capsys, number, mend):
    def fail():
        code = getattr(errno, number)
        raise OSError(code, "it is so", "/x/y" if number != "EAGAIN" else None)

    verb(fail)
    assert cli.main(["trial"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    start = "the system refused" if number == "EAGAIN" else "could not use /x/y"
    assert said.startswith(f"error: {start}: it is so. ") and mend in said
