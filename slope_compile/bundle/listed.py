"""placement.json and layers.json of a bundle, read as what anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from slope_compile.artifacts import read_json
from slope_compile.bundle.contents import REMEDY, Part
from slope_compile.errors import ArtifactError
from slope_compile.placement.choose import Place
from slope_compile.recipe import Placement, parse_pattern


class _PlaceRow(Part):
    container: str
    placement: Placement
    reason: str
    block_size: Annotated[int, Field(ge=0)]
    costs: dict[Placement, float]


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
    return [Place(**row.model_dump()) for row in _read(path, TypeAdapter(_Places)).places]


def read_layers(path: Path) -> dict[str, Any]:
    """Return the export's rows of the layers, from layers.json.

    Raises:
        ArtifactError: If the file is not what `export` writes.
    """
    layers: dict[str, Any] = _read(path, TypeAdapter(_Layers)).model_dump(mode="json")
    return layers


def _read(path: Path, form: TypeAdapter[Any]) -> Any:
    try:
        return form.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        told = str(error)
    raise ArtifactError(f"{path} is not the bundle's: {told[:300]}.", REMEDY)
