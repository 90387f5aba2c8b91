"""The rooms are what docs/design.md says: few modules at the root, one room per idea."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mdpd_deploy", "train", "export", "serve")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DESIGN = (ROOT / "docs" / "design.md").read_text()


def test_the_core_has_at_most_twelve_modules_of_its_own():
    assert len(list((ROOT / "mdpd_deploy").glob("*.py"))) <= 12


def test_only_tasks_know_the_kinds_of_task():
    kinds = re.compile(r"""["'](regress|classify)["']""")
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "mdpd_deploy" / "tasks"):
            lines = path.read_text().splitlines()
            assert not [line for line in lines if kinds.search(line) and ">>>" not in line], path


def test_no_function_is_longer_than_a_hundred_lines():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 100, (path, node.name)


@pytest.mark.parametrize("room", sorted({path.parent for path in SOURCES}), ids=str)
def test_the_design_names_every_room(room):
    assert room.name in DESIGN


def test_every_path_that_the_design_names_exists():
    named = set(re.findall(r"`([\w/]+/(?:[\w.]+\.py)?|[\w/]+\.py)`", DESIGN))
    assert len(named) > 25
    known = [path.as_posix() for path in (*SOURCES, *(room.parent for room in SOURCES))]
    known += ["/tests/", *(path.as_posix() for path in (ROOT / "tests").glob("*.py"))]
    for name in named:
        assert any(f"{path}/".endswith(f"/{name.rstrip('/')}/") for path in known), name
