"""Show type checkers the package as it installs: link the mapped folders under build/types.

Run once after cloning, and again after adding a module to mdpd_deploy/ itself.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "types"


def main() -> None:
    """Rebuild the link tree from the folder mapping in pyproject.toml."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapping = pyproject["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    for name, folder in sorted(mapping.items()):
        target = TREE.joinpath(*name.split("."))
        if any(other.startswith(f"{name}.") for other in mapping):
            target.mkdir(parents=True)
            for item in (ROOT / folder).iterdir():
                if item.name != "__pycache__":
                    (target / item.name).symlink_to(item)
        else:
            target.symlink_to(ROOT / folder, target_is_directory=True)


if __name__ == "__main__":
    main()
