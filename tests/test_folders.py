"""Output folders: whoever is killed, runs out of space or names a wrong place loses nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mdpd_deploy.artifacts.folders import atomic_folder, claimed, free_path, is_claimed
from mdpd_deploy.errors import UserError, WorkFailed

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from mdpd_deploy.artifacts.folders import atomic_folder

rename, left = os.replace, int(sys.argv[2])
def replace(*places):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*places)
os.replace = replace
with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
    for name in "abc":
        (folder / name).write_text("new")
"""


@pytest.mark.parametrize(("renames", "kept"), [(1, "old"), (2, None), (3, "new")])
def test_replacing_a_folder_leaves_the_old_one_the_new_one_or_none(
    renames, kept, tmp_path, run_python
):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text("old")
    (tmp_path / ".bundle-2.99999999.tmp").mkdir()  # another target's is not ours
    done = run_python("-c", KILLED_AT, str(folder), str(renames))
    assert (done.returncode == -signal.SIGKILL) == (kept != "new"), done.stderr
    found = {path.name: path.read_text() for path in folder.glob("*")}
    assert found == (dict.fromkeys("abc", kept) if kept else {})
    with pytest.raises(RuntimeError), atomic_folder(folder, overwrite=True):
        raise RuntimeError("the next attempt fails")
    found = {path.name: path.read_text() for path in folder.glob("*")}
    assert found == dict.fromkeys("abc", kept or "old"), "none was lost"
    with atomic_folder(folder, overwrite=True) as again:
        (again / "d").write_text("newest")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", ".bundle-2.99999999.tmp"}
    assert [path.name for path in folder.iterdir()] == ["d"]


def test_of_two_programs_the_first_to_end_keeps_its_folder(tmp_path):
    folder = tmp_path / "bundle"
    said = r"another program has written to .* meanwhile"
    with pytest.raises(UserError, match=said), atomic_folder(folder) as late:
        (late / "a").write_text("late")
        folder.mkdir()
        (folder / "a").write_text("first")
    assert (folder / "a").read_text() == "first" and list(tmp_path.iterdir()) == [folder]


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_text("old")
    rename = os.replace

    def no_new_one(source, target):
        if Path(target) == folder and not Path(source).name.endswith(".old.tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", no_new_one)
    with pytest.raises(WorkFailed, match="No space left"), atomic_folder(folder, overwrite=True):
        pass
    assert (folder / "a").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new"


def test_a_place_that_cannot_be_written_is_bad_input():
    with (
        pytest.raises(UserError, match=r"cannot be written .*: choose another --out"),
        atomic_folder(Path("/proc/none/b")),
    ):
        pass


HOLDS = """
import sys, time
from pathlib import Path
from mdpd_deploy.artifacts.folders import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_program_lets_go_of_its_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"held\n"
        assert is_claimed(tmp_path / "run")
        with pytest.raises(UserError, match="another training is writing to"):
            claimed(tmp_path / "run").__enter__()
        child.kill()
    assert not is_claimed(tmp_path / "run")
    with claimed(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_taken_name_gets_a_number(tmp_path):
    assert free_path(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_path(tmp_path / "demo") == tmp_path / "demo-3"
