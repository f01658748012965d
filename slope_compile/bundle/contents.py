"""bundle.json: what an archive holds, for which target it was placed, and with what it is to be built."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slope_compile._version import __version__
from slope_compile.errors import ArtifactError
from slope_compile.recipe import BuildSection
from slope_compile.targets.target import TensorRTRange
from slope_compile.targets.versions import parse_version

FORMAT: Final = 1
KIND: Final = "slope-compile bundle"
INDEX = "bundle.json"  # lists every other file
MODEL, PLACED, CODES, GOLDEN = "model.onnx", "placed.onnx", "codes.safetensors", "golden.safetensors"
LAYERS, PLACEMENT, RECIPE = "layers.json", "placement.json", "recipe.yaml"
REQUIRED = frozenset({MODEL, PLACED, CODES, GOLDEN, LAYERS, PLACEMENT, RECIPE})
# Every name that a file may have. There is no folder among them, so none can leave the one that they are written to.
NAMES = REQUIRED | {f"{MODEL}.data", "placed.data"}
MAX_FILE_BYTES = 2**33
MAX_INDEX_BYTES = 2**20
REMEDY = "Copy the bundle again, or make it anew with `slope-compile bundle`."

Text = Annotated[str, Field(min_length=1, max_length=1000)]
# A part of a path: verify/TARGET
TargetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,60}$")]
Share = Annotated[float, Field(gt=0)]
VERSION = re.compile(r"\d{1,9}(\.\d{1,9}){0,4}")


class Part(BaseModel):
    """A part of bundle.json: unknown keys refused, values immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Entry(Part):
    """Size in bytes and sha256 of one file."""

    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES, strict=True)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Allowed(Part):
    """How far an engine's outputs may be off, relative to the largest, and why; from 1 on they tell nothing."""

    relative: Share
    derivation: Text


class Contents(Part):
    """What bundle.json says.

    Args:
        format: Version of this layout.
        kind: That it is one of ours.
        made_by: Version of slope-compile that wrote it.
        name: The run that it was made from.
        target: The GPU that the model was placed for.
        backend: Who is to build the engine.
        planned_for: The version of that backend which the placement was chosen for.
        versions: Those that may build it.
        build: The recipe's `build`, the target alone in `targets`, every batch size spelt out, no timing cache: a path
            that another machine names is not read here.
        precision: Type of the activations that are not quantized.
        precision_reason: Why.
        allowed: What the engine's outputs may differ by; null where rounding alone moves them anywhere.
        metric: Name of the accuracies' figure.
        accuracies: `fp32`, `compressed` -> what training measured; told, not checked.
        files: Name -> size and sha256 of everything else in the archive.
    """

    format: Literal[1]
    kind: Literal["slope-compile bundle"]
    made_by: Text
    name: Text
    target: TargetName
    backend: Literal["tensorrt", "tensorrt-rtx"]
    planned_for: Text
    versions: Annotated[tuple[TensorRTRange, ...], Field(min_length=1)]
    build: BuildSection
    precision: Literal["fp32", "fp16", "bf16"]
    precision_reason: Text
    allowed: Allowed | None
    metric: Text
    accuracies: dict[Literal["fp32", "compressed"], float | None]
    files: dict[str, Entry]

    @model_validator(mode="after")
    def _complete(self) -> Contents:
        if strange := sorted(self.files.keys() - NAMES):
            raise ValueError(f"it lists '{strange[0][:100]}', which no bundle has")
        if missing := sorted(REQUIRED - self.files.keys()):
            raise ValueError(f"it lists no {', '.join(missing)}")
        for row in self.versions:
            if not VERSION.fullmatch(row.first) or not VERSION.fullmatch(row.below):
                raise ValueError(f"versions from {row.first[:30]} to below {row.below[:30]} are none")
        if not VERSION.fullmatch(self.planned_for):
            raise ValueError(f"it was planned for {self.planned_for[:30]}, which is no version")
        if self.build.targets != [self.target]:
            raise ValueError(f"it is for {self.target}, and its build for {', '.join(self.build.targets)[:100]}")
        if self.build.timing_cache is not None:
            raise ValueError(f"its build names the timing cache {self.build.timing_cache[:100]}; no bundle names one")
        return self

    @property
    def version_range(self) -> str:
        """The versions that may build it, in words."""
        return ", ".join(f"{row.first} to below {row.below} ({row.system})" for row in self.versions)

    def accepts(self, version: str) -> bool:
        """Whether an engine may be built with that version of the backend."""
        return any(row.holds(version) for row in self.versions)

    def to_json(self) -> str:
        """Return bundle.json's text: the same contents, the same bytes."""
        dumped = self.model_dump(mode="json", by_alias=True)
        return json.dumps(dumped, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_contents(text: bytes, archive: str) -> Contents:
    """Return what bundle.json says.

    Args:
        text: Its bytes.
        archive: What to call the archive in an error.

    Raises:
        ArtifactError: If it is none of ours, of a later format, or holds something else than it should.
    """
    try:
        raw: Any = json.loads(text)
        json.dumps(raw, ensure_ascii=False).encode()  # refuses "\ud800", half a character, which nothing can write
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{archive}: {INDEX} is not JSON: {_short(error)}.", REMEDY) from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise ArtifactError(f"{archive} is not a bundle: its {INDEX} is of something else.", REMEDY)
    found, maker = raw.get("format"), raw.get("made_by")
    upgrade = f"Install slope-compile {_short(maker)} or later here, as on the machine that made it."
    if type(found) is not int:
        raise ArtifactError(f"{archive}: {INDEX} has the format {_short(found)}, which is no number.", REMEDY)
    if found > FORMAT:
        raise ArtifactError(
            f"{archive} is a bundle of format {_short(found)}; this slope-compile reads format {FORMAT}.", upgrade
        )
    try:
        return Contents.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        numbered = isinstance(maker, str) and VERSION.fullmatch(maker) is not None
        later = numbered and parse_version(str(maker)) > parse_version(__version__)
        raise ArtifactError(
            f"{archive}: {INDEX}{where and f', {_short(where)}'}: {_short(what)}.", upgrade if later else REMEDY
        ) from None


def _short(value: object) -> str:
    # A list may be nested too deeply to be written out.
    text = type(value).__name__ if isinstance(value, list | dict) else str(value)
    return "".join(c if c.isprintable() else " " for c in text[:200])
