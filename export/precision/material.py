"""What a conversion may look at besides the graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mdpd_deploy.artifacts.golden import Golden, spread_evenly
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.errors import UserError
from mdpd_deploy.runtimes.base import Arrays

if TYPE_CHECKING:  # its forms name the converters, which take what is here
    from mdpd_deploy.export.options import ExportOptions

CALIBRATION_INPUTS, CALIBRATION_BATCH = 256, 8


@dataclass(frozen=True)
class Calibration:
    """Inputs that ranges of activations are read from.

    Attributes:
        source: What they are, for the manifest, e.g. `128 training inputs`.
        batches: Named arrays, a batch each.
    """

    source: str
    batches: Sequence[Arrays]


@dataclass(frozen=True)
class Material:
    """Handed to every converter; each takes what it needs.

    Attributes:
        golden: The bundle's golden inputs.
        calibration: Reads a sample of the task's training inputs.
        autocast_python: Interpreter of the environment that holds ModelOpt.
        converted: A file that was already converted elsewhere; None = convert here.
    """

    golden: Calibration
    calibration: Callable[[], Calibration]
    autocast_python: Path | None = None
    converted: Path | None = None


def material_of(run: Run, golden: Golden, asked: "ExportOptions") -> Material:
    """Gather what converters may look at; the training inputs are read only if one asks."""
    made_up = asked.golden == "synthetic"
    what = "made-up golden inputs" if made_up else "golden inputs from validation"

    def calibration() -> Calibration:
        try:
            train = run.load_task_data().train
        except UserError as err:
            raise UserError(
                "static int8 is calibrated on the run's training inputs, since made-up ones would "
                f"give wrong ranges, and they cannot be read: {err}"
            ) from err
        raws = spread_evenly(train.inputs, CALIBRATION_INPUTS)
        starts = range(0, len(raws), CALIBRATION_BATCH)
        parts = [run.preprocess(raws[start : start + CALIBRATION_BATCH]) for start in starts]
        return Calibration(f"{len(raws)} training inputs", parts)

    own = Calibration(what, [golden.arrays])
    return Material(own, calibration, asked.autocast_python, asked.converted)
