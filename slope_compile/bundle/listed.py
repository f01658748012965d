"""placement.json and layers.json of a bundle, read as what anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from slope_compile.artifacts import read_json
from slope_compile.bundle.contents import REMEDY, Part
from slope_compile.errors import ArtifactError
from slope_compile.placement.choose import Place
from slope_compile.recipe import Placement, parse_pattern

Container = Literal["INT4", "INT8", "FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64"]
# The containers in which `placement.rules.storage` puts a placement; what was not compressed keeps the type it has.
_CONTAINERS: dict[Placement, tuple[Container, ...]] = {
    "sparse-int8": ("INT8",),
    "int8": ("INT8",),
    "sparse-fp16": ("FLOAT16", "BFLOAT16"),
    "int4-weight": ("INT4",),
    "int8-weight": ("INT8",),
    "int4-storage": ("INT4",),
    "float": ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64"),
}
_MAX_BLOCK = 2**31 - 1


class _PlaceRow(Part):
    container: Container
    placement: Placement
    reason: str
    block_size: Annotated[int, Field(ge=0, le=_MAX_BLOCK)]
    costs: dict[Placement, float]

    @model_validator(mode="after")
    def _fitting(self) -> _PlaceRow:
        if self.container not in _CONTAINERS[self.placement]:
            raise ValueError(f"{self.placement} in {self.container}, which no placement is")
        if self.block_size and self.container != "INT4":
            raise ValueError(f"{self.container} in blocks of {self.block_size}, and only INT4 has blocks")
        return self


class _Places(Part):
    places: list[_PlaceRow]


def _is_pattern(text: str) -> str:
    parse_pattern(text)
    return text


class _LayerRow(BaseModel):
    """What a row must have; what else the export wrote is kept as it is."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    name: str
    op: str
    placement: str
    reason: str
    container: str
    bits: int | None
    pattern: Annotated[str, AfterValidator(_is_pattern)] | None
    shape: list[int]
    bytes: dict[str, int]
    density: float


class _Layers(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    layers: list[_LayerRow]


def read_places(path: Path) -> list[Place]:
    """Return what becomes of each weight, in the model's order, from placement.json.

    Raises:
        ArtifactError: If the file is not what `bundle` writes.
    """
    return [Place(**row) for row in _read(path, _Places)["places"]]


def read_layers(path: Path) -> dict[str, Any]:
    """Return the export's rows of the layers, from layers.json.

    Raises:
        ArtifactError: If the file is not what `export` writes.
    """
    return _read(path, _Layers)


def _read(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    try:
        return form.model_validate(read_json(path)).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also half a character, such as "\\ud800"
        told = str(error)
    raise ArtifactError(f"{path} is not the bundle's: {told[:300]}.", REMEDY)
