"""How an engine is built, apart from the model: the keys of a recipe's `build` that become settings of a builder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slope_compile.recipe import BuildSection  # the process that builds needs no recipe, and no pydantic

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Settings of a builder.

    Args:
        workspace: Scratch memory that a kernel may use, bytes; None: all that the GPU has.
        optimization_level: 0 (fast build) to 5 (fast engine); None: the backend's own.
        version_compatible: Whether later versions of the same backend may load the engine.
        hardware_compatibility: `none`, `ampere-plus` or `same-compute-capability`.
        refit: Whether weights can be replaced in the engine.
        strip: Whether the engine is written without its weights.
        dla: DLA core that gets what it can run; None: the GPU runs everything.
    """

    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    refit: bool = False
    strip: bool = False
    dla: int | None = None

    @classmethod
    def of(cls, section: BuildSection) -> Options:
        """Return the settings that a recipe's `build` asks for."""
        return cls(
            workspace=None if section.workspace_gib is None else int(section.workspace_gib * GIB),
            optimization_level=section.optimization_level,
            version_compatible=section.version_compatible,
            hardware_compatibility=section.hardware_compatibility,
            refit=section.refit,
            strip=section.strip,
            dla=section.dla,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON takes them."""
        return asdict(self)
