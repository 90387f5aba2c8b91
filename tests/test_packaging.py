"""The package as it installs: folders, wheel, guards, who imports whom, the doors."""

import ast
import doctest
import importlib
import re
import shutil
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

import mdpd_deploy

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPING: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
AREAS = ("mdpd_deploy.train", "mdpd_deploy.export", "mdpd_deploy.serve")
COMMANDS = "mdpd_deploy.commands"

# Modules of the inference path: no torch at import.
TORCH_FREE = (
    "mdpd_deploy.errors",
    "mdpd_deploy.registry",
    "mdpd_deploy.files",
    "mdpd_deploy.artifacts.once",
    "mdpd_deploy.text",
    "mdpd_deploy.report.terminal",
    "mdpd_deploy.artifacts.signing",
    "mdpd_deploy.artifacts.folders",
    "mdpd_deploy.config",
    "mdpd_deploy.artifacts.bundle",
    "mdpd_deploy.runtimes.onnx",
    "mdpd_deploy.runtimes.tensorrt.runner",
    "mdpd_deploy.runtimes.tensorrt.refit",
    "mdpd_deploy.runtimes.tensorrt.cache",
    "mdpd_deploy.runtimes.tensorrt.swap",
    "mdpd_deploy.commands.build_engine",
    "mdpd_deploy.data",
    "mdpd_deploy.data.preprocess",
    "mdpd_deploy.tasks.metrics",
    "mdpd_deploy.commands.evaluate",
    "mdpd_deploy.commands.predict",
    "mdpd_deploy.commands.sign",
    "mdpd_deploy.commands.verify",
    "mdpd_deploy.checks.verification",
    "mdpd_deploy.commands.serve",
    "mdpd_deploy.serve.core",
    "mdpd_deploy.serve.web.run",
)
# Import names that differ from the name in the index.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
OPTIONAL = (
    "onnxruntime",
    "tensorrt",
    "cuda",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "trackio",
)


def sources() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for name, folder in MAPPING.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = file
    return found


MODULES = sources()


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported_from(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Names of modules that a statement may import, `from a import b` counted as `a.b` too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"{module}:{node.lineno} is a relative import"
    return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]


def imports(module: str, *, only_at_import_time: bool = False) -> set[str]:
    """What a module imports anywhere, or only when it is imported itself."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(imported_from(node, module))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (only_at_import_time and (inside or for_types)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(parse(module))
    return found


def test_every_package_folder_is_listed():
    packages = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in MAPPING.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert packages == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_modules_is_a_package():
    for file in MODULES.values():
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, run_python) -> Path:
    """Build from a copy, so that no leftover of the checkout gets in and none is left in it."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in MAPPING.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", PYPROJECT["project"]["readme"]):
        shutil.copy(ROOT / file, copy / file)
    done = run_python(
        *("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"),
        *("--wheel-dir", str(copy / "dist"), str(copy)),
    )
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_asset(wheel):
    expected = {
        Path(*name.split("."), file.relative_to(ROOT / folder)).as_posix()
        for name, folder in MAPPING.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "mdpd_deploy/py.typed" in expected
    assert any(name.startswith("mdpd_deploy/assets/") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == expected
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_wheel_imports_away_from_the_checkout(wheel, tmp_path, run_python):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import mdpd_deploy, mdpd_deploy.train, mdpd_deploy.export, mdpd_deploy.serve\n"
        "for package in (mdpd_deploy, mdpd_deploy.train, mdpd_deploy.export, mdpd_deploy.serve):\n"
        "    print(package.__file__)\n"
        "from mdpd_deploy.cli import main\n"
        "assert main(['--help']) == 0"
    )
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[:4]:
        assert Path(line).is_relative_to(tmp_path / "site")


@pytest.mark.parametrize("folder", [MAPPING[area] for area in AREAS])
def test_a_bare_import_of_an_area_is_refused(folder, run_python):
    done = run_python("-c", f"import {folder}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import mdpd_deploy.{folder}, not '{folder}'" in done.stderr


def test_a_checkout_that_is_not_installed_says_so(run_python):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mdpd_deploy"
    done = run_python("-I", "-S", "-c", code)  # -S: no site-packages, so nothing is installed
    assert done.returncode == 1
    assert "not installed: run `pip install -e .`" in done.stderr


def test_every_module_imports_without_any_extra(run_python):
    """What `pip install mdpd-deploy` alone gives must import, with no optional package about."""
    names = sorted(set(MODULES) - {"mdpd_deploy.__main__"})
    code = f"""
import importlib, sys, traceback
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {OPTIONAL!r}:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):  # importlib.metadata asks finders for more
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
failed = []
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception as err:
        failed.append(f"{{name}}: {{err!r}}")
if "peft" in sys.modules:
    failed.append("peft is imported where no adapter is built")
print(*failed, sep="\\n")
sys.exit(bool(failed))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stdout


def test_the_inference_path_loads_no_torch(run_python):
    code = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing(run_python):
    code = "import sys, mdpd_deploy; print(sorted(n for n in sys.modules if 'mdpd' in n))"
    loaded = ast.literal_eval(run_python("-c", code).stdout)
    assert [name for name in loaded if not name.startswith("__editable__")] == ["mdpd_deploy"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_may_know_whom(module):
    """The core knows no area, areas know the core only, verbs know them all."""
    mine = next((area for area in AREAS if is_below(module, area)), None)
    for name in imports(module):
        area = next((area for area in AREAS if is_below(name, area)), None)
        if area is None or area == mine or module == "mdpd_deploy":
            continue
        assert is_below(module, COMMANDS), f"{module} imports {name}"
    if not is_below(module, COMMANDS) and module not in ("mdpd_deploy", "mdpd_deploy.cli"):
        assert not [name for name in imports(module) if is_below(name, COMMANDS)]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if is_below(name, COMMANDS)))
def test_verbs_are_light_to_import(module):
    allowed = {*sys.stdlib_module_names, "typer"}
    for name in imports(module, only_at_import_time=True):
        ours = is_below(name, "mdpd_deploy.errors") or is_below(name, COMMANDS)
        light = name.partition(".")[0] in allowed or ours
        assert light or name == "mdpd_deploy", f"{module} imports {name} when it is imported"


def test_every_foreign_import_is_a_declared_dependency():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in declared}
    allowed = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    allowed |= {*sys.stdlib_module_names, "mdpd_deploy"}
    for module in MODULES:
        strangers = {name.partition(".")[0] for name in imports(module)} - allowed
        assert not strangers, f"{module} imports {strangers}, which pyproject.toml does not name"


def test_no_import_path_is_installed_but_ours(run_python):
    """Nothing of the checkout besides mdpd_deploy may be importable by its bare name."""
    code = "from importlib.util import find_spec as f; print([f(n) for n in ('train', 'export', 'serve')])"
    assert run_python("-P", "-c", code).stdout.strip() == "[None, None, None]"


def test_the_door_opens_every_name():
    assert set(mdpd_deploy.__all__) == {*mdpd_deploy._HOME, "__version__"}
    for name in mdpd_deploy.__all__:
        assert getattr(mdpd_deploy, name) is not None
        assert name in dir(mdpd_deploy)
    folders = {name.rpartition(".")[2] for name in PYPROJECT["tool"]["setuptools"]["packages"]}
    assert not set(mdpd_deploy.__all__) & folders
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = mdpd_deploy.nope


def test_the_version_is_the_projects():
    assert mdpd_deploy.__version__ == PYPROJECT["project"]["version"]


@pytest.mark.parametrize("package", sorted(PYPROJECT["tool"]["setuptools"]["packages"]))
def test_a_door_lists_what_it_imports(package):
    """What an `__init__` takes from its modules and does not use is in `__all__`; all of it opens."""
    if package == "mdpd_deploy":
        return  # lazy: test_the_door_opens_every_name
    taken = {
        alias.asname or alias.name
        for node in ast.walk(parse(package))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{package}.")
        for alias in node.names
    }
    door = importlib.import_module(package)
    listed = getattr(door, "__all__", [])
    assert len(listed) == len(set(listed))
    used = {node.id for node in ast.walk(parse(package)) if isinstance(node, ast.Name)}
    assert not taken - used - set(listed)
    for name in listed:
        assert getattr(door, name) is not None


@pytest.mark.parametrize("name", [n for n, f in MODULES.items() if ">>> " in f.read_text()])
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    """By installed name: `pytest --doctest-modules train` would import a second copy.

    The examples of the Python API go on from one another: tests/test_api.py runs those.
    """
    monkeypatch.chdir(tmp_path)
    elsewhere = {f"{home}.{public}" for public, home in mdpd_deploy._HOME.items()}
    for test in doctest.DocTestFinder().find(importlib.import_module(name), name):
        if test.name not in elsewhere:
            assert doctest.DocTestRunner().run(test).failed == 0, test.name


def test_no_word_in_the_source_points_at_a_page_that_is_not_here():
    """Marks of decisions that are numbered elsewhere: a reader could not follow them."""
    marks = re.compile(r"\bD\d{1,2}\b|\bmethods(?:\.md)? \d|deployment facts")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("mdpd_deploy", "train", "export", "serve", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if marks.search(line) and "FF D" not in line
    ]
    assert found == []


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert (pins["torch"], pins["torchvision"]) == ("2.15.0", "0.29.2")
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    extras = PYPROJECT["project"]["optional-dependencies"]
    for line in [*PYPROJECT["project"]["dependencies"], *extras["demo"], *extras["dev"]]:
        name = re.split(r"[^\w.-]", line)[0].lower()
        assert name in {*pinned, "mdpd-deploy"}, f"constraints.txt does not pin {name}"
