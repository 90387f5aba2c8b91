"""The library peft, imported where one of its parts is needed and nowhere else."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from mdpd_deploy.errors import UserError

TESTED = "0.21.2"  # as in constraints.txt


def from_peft(*names: str, module: str = "peft") -> list[Any]:
    """Return parts of the library peft by name.

    Args:
        names: Classes of `module`.
        module: Where they are.

    Raises:
        UserError: If the installed version does not have them.
    """
    try:
        found = import_module(module)
        return [getattr(found, name) for name in names]
    except (ImportError, AttributeError) as err:
        raise UserError(
            f"the installed peft {version('peft')} has no usable {' and '.join(names)} "
            f"({str(err).splitlines()[0]}): pip install peft=={TESTED}, or use another method."
        ) from err
