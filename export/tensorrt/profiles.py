"""From a graph's shape spec to TensorRT's optimisation profile."""

from collections.abc import Mapping, Sequence
from typing import Any

from mdpd_deploy.errors import ExportError, UserError
from mdpd_deploy.runtimes.tensorrt.library import said

BOUNDS = ("min", "opt", "max")
BATCH = "batch"
Profiles = dict[str, dict[str, list[int]]]


def profile_shapes(graph: Mapping[str, Any], *, static_batch: int | None = None) -> Profiles:
    """Return min, opt and max shape of each input, from the graph's shape spec.

    Args:
        graph: Its entry in the manifest.
        static_batch: The only batch size, in place of the spec's range.

    Raises:
        UserError: If an axis has no range, or one that is not min <= opt <= max.
    """
    inputs: Sequence[Mapping[str, Any]] = graph["inputs"]
    spec = {axis: dict(bounds) for axis, bounds in graph["shapes"].items()}
    if static_batch is not None:
        spec[BATCH] = dict.fromkeys(BOUNDS, static_batch)
    for axis, bounds in spec.items():
        if not bounds["min"] <= bounds["opt"] <= bounds["max"]:
            raise UserError(f"shapes.{axis} must be min <= opt <= max, is {bounds}.")
    named = {axis for port in inputs for axis in port["shape"] if isinstance(axis, str)}
    if named - set(spec):
        raise UserError(f"shapes says nothing of the axis {min(named - set(spec))!r}.")
    return {
        port["name"]: {
            bound: [spec[axis][bound] if isinstance(axis, str) else axis for axis in port["shape"]]
            for bound in BOUNDS
        }
        for port in inputs
    }


def add_profile(builder: Any, network: Any, config: Any, logger: Any, profiles: Profiles) -> None:
    """Give the builder the ranges of every dynamic input.

    TensorRT takes a profile that forgets an input and fails only at the build, and `set_shape`
    swallows a range that is upside down; so the names are compared first and the answer is read.

    Raises:
        ExportError: If the profile is not one of the network's inputs.
    """
    found = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = {tensor.name for tensor in found if -1 in tuple(tensor.shape)}
    known = {tensor.name for tensor in found}
    if not dynamic <= set(profiles) <= known:
        raise ExportError(
            f"the graph's inputs are {', '.join(sorted(known))}, the shape spec has "
            f"{', '.join(sorted(profiles))}: export the run again."
        )
    for tensor in found:
        for bound, shape in profiles.get(tensor.name, {}).items():
            if not _fits(shape, tuple(tensor.shape)):
                raise ExportError(
                    f"the graph's {tensor.name} is {tuple(tensor.shape)}, the shape spec's {bound} "
                    f"is {shape}: export the run again."
                )
    profile = builder.create_optimization_profile()
    for name in sorted(dynamic):
        profile.set_shape(name, *(tuple(profiles[name][bound]) for bound in BOUNDS))
    if not profile or config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses the shapes {profiles}: {said(logger.errors)}.")


def _fits(shape: Sequence[int], wanted: tuple[int, ...]) -> bool:
    """Whether a shape has the fixed axes of the graph; -1 marks those that are free."""
    return len(shape) == len(wanted) and all(
        size == fixed or fixed == -1 for size, fixed in zip(shape, wanted, strict=True)
    )
