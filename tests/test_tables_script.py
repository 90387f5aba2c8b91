"""The commands behind the committed tables: each is one that today's program takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mdpd_deploy.commands.study_plan import expand_all, method_configs, shared_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import evidence
    import tables
finally:
    sys.path.pop(0)

COMMANDS = [(name, command) for name, table in tables.TABLES.items() for command in table.commands]


def options_of(command: str) -> dict[str, list[str]]:
    """Return option → values; every option of these commands has one value."""
    words = tables.words_of(
        tables.TABLES["mrpc"], command, {"data": "DATA", "encoder": "builtin:vit-xs-tin32"}
    )
    words = words[words.index("compare") + 1 :]
    found: dict[str, list[str]] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        found.setdefault(option, []).append(value)
    return found


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_method_and_option_of_a_table_is_known(name, command):
    options = options_of(command)
    flags = {
        "backbone": options.get("--backbone", [None])[0],
        "steps": options.get("--steps", [None])[0],
    }
    base, _ = shared_config(None, options.get("--set", []), flags)
    methods = expand_all(options["--methods"][0].split(","))
    assert len(method_configs(base, methods)[0]) == len(methods)


def test_every_committed_table_has_its_command():
    committed = {path.name for path in (ROOT / "docs" / "results").glob("*.json*")}
    of_accuracy = {table.file for table in tables.TABLES.values()}
    assert of_accuracy <= committed
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for name in tables.TABLES:
        assert f"tables.py {name}" in page or f"`{name}`" in page, name


def test_the_commands_can_be_read_without_running_them(tmp_path):
    words = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "glue-200", "--print"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (
        "--task glue/stsb --methods norms" in done.stdout and "mdpd_deploy compare" in done.stdout
    )
    assert list(tmp_path.iterdir()) == []


def test_the_page_holds_what_the_committed_results_say():
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    results = ROOT / "docs" / "results"
    assert tables.overview(results) in page
    assert tables.rates(results) in page
    study = evidence.read(results / "evidence.jsonl")
    assert evidence.table([json.loads(line) for line in study]).strip() in page
    picture = (results / "stsb-rates.svg").read_text(encoding="utf-8")
    names = re.compile(r">([a-z][\w:-]*)</text>")
    assert names.findall(tables.picture(results)) == names.findall(picture)
    for line in (tables.answer(results) + "\n" + tables.kept(results)).splitlines():
        if "[" not in line:
            continue
        gap = line.split("|")[3].strip().replace("-", "−")
        assert gap in page, line
