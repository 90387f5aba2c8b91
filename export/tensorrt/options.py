"""What a user can ask of a TensorRT engine: chosen at export, kept in the recipe, or given later."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.runtimes.tensorrt.cache import (
    AMPERE_PLUS,
    SAME_CAPABILITY,
    VERSION_COMPATIBLE,
    EngineKey,
)

Hardware = Literal["ampere+", "same-compute-capability"]
HARDWARE = (AMPERE_PLUS, SAME_CAPABILITY)
NO_LEVEL = "none"
MIB = 1 << 20
OPTIMIZATION_LEVEL = 3  # of 0 to 5; TensorRT's own default


class EngineOptions(BaseModel):
    """How an engine is built; the defaults are TensorRT's own.

    Attributes:
        static_batch: The one batch size of the engine; None = the bundle's range of batches.
        tf32: Whether FP32 matrix products may use TF32.
        version_compatible: Also runs on later releases of TensorRT; slower, and the plan then
            carries code for the processor.
        hardware_compatible: GPUs that it also runs on; slower. None = the GPU it is built on.
        refit: Norms and head can be exchanged without building again.
        workspace_mib: Limit of the memory that TensorRT may use while it computes [MiB]; None =
            what the GPU has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    static_batch: int | None = Field(default=None, ge=1)
    tf32: bool = True
    version_compatible: bool = False
    hardware_compatible: Hardware | None = None
    refit: bool = False
    workspace_mib: int | None = Field(default=None, ge=1)

    @classmethod
    def of(cls, key: EngineKey) -> "EngineOptions":
        """Return the options that an engine was built with; its profiles are in its key."""
        return cls(
            tf32="TF32" in key.flags,
            version_compatible=VERSION_COMPATIBLE in key.flags,
            hardware_compatible=None if key.hardware == NO_LEVEL else key.hardware,  # type: ignore[arg-type]  # checked on construction
            refit=bool(key.refit),
            workspace_mib=None if key.workspace_bytes is None else key.workspace_bytes // MIB,
        )

    @property
    def workspace_bytes(self) -> int | None:
        """The limit in bytes."""
        return None if self.workspace_mib is None else self.workspace_mib * MIB

    def override(self, chosen: Mapping[str, Any]) -> "EngineOptions":
        """Return these options with what a user gave in their place.

        Args:
            chosen: By field; None = not given. A static batch of 0 and the level "none" take back
                what a recipe says.

        Raises:
            UserError: For a value that cannot be; the message names the option.
        """
        given = {name: value for name, value in chosen.items() if value is not None}
        batch, workspace = given.get("static_batch", 0), given.get("workspace_mib", 1)
        level = given.get("hardware_compatible", NO_LEVEL)
        if batch < 0:
            raise UserError(f"--static-batch {batch}: give a number of examples, 0 for a range.")
        if workspace < 1:
            raise UserError(f"--workspace {workspace}: give at least 1 MiB.")
        if level not in (NO_LEVEL, *HARDWARE):
            raise unknown("--hardware-compatible", level, (NO_LEVEL, *HARDWARE))
        nothing = {"static_batch": 0, "hardware_compatible": NO_LEVEL}
        plain = {n: None if n in nothing and v == nothing[n] else v for n, v in given.items()}
        return EngineOptions.model_validate({**self.model_dump(), **plain})
