"""JSON files of finished stages, read as what anybody may have written: each error names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from slope_compile.artifacts import read_json
from slope_compile.errors import ArtifactError
from slope_compile.metric_names import WORDS, compared
from slope_compile.recipe import parse_pattern

LARGEST = 2**63  # of an integer: sizes are below it, and it still divides
F = TypeVar("F", bound="Form")


class Form(BaseModel):
    """A JSON object of ours: what is read of it has the type that it was written with; other keys are left alone."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


def _a_pattern(text: str) -> str:
    parse_pattern(text)
    return text


Count = Annotated[int, Field(ge=0)]
Pattern = Annotated[str, AfterValidator(_a_pattern)]


class Bytes(Form):
    """Of a layer."""

    fp32: Count
    file: Count


class LayerRow(Form):
    """One layer of an export's layers.json."""

    name: str
    op: str
    placement: str
    reason: str
    container: str
    bits: Annotated[int, Field(ge=2, le=8)] | None
    pattern: Pattern | None
    shape: list[Count]
    bytes: Bytes
    density: float


class ActivationRow(Form):
    """One quantizer of activations there."""

    name: str
    bits: int
    scale: float
    low: int
    high: int
    pairs: Count


class ExportList(Form):
    """An export's layers.json; `activations` where they are quantized."""

    layers: list[LayerRow]
    activations: list[ActivationRow] = []


class PlanRow(Form):
    """What the policy gave one layer."""

    name: str


class Metrics(Form):
    """train/metrics.json; both models have a figure of every metric that the run is judged by, or none was measured."""

    metric: str
    fp32: dict[str, Any] | None
    compressed: dict[str, Any] | None
    fp32_bytes: Count
    plan: list[PlanRow]
    layers: dict[str, dict[str, Any]]

    @model_validator(mode="after")
    def _measured(self) -> Metrics:
        for which in ("fp32", "compressed"):
            figures = getattr(self, which)
            for metric in () if figures is None else compared(self.metric):
                if metric not in figures:
                    raise ValueError(f"{which} has no {metric}")
                if not isinstance(figures[metric], float | int | None) or isinstance(figures[metric], bool):
                    raise ValueError(f"{which}.{metric} is {figures[metric]!r}, no number")
        return self


class Sparse(Form):
    """Counts of sparse kernels; None: not known, and why stands beside."""

    eligible: Count | None
    eligible_by: str
    chosen: Count | None
    chosen_by: str
    fits_2_4: Count
    possible: Count


class Products(Form):
    """Of a summary."""

    fused: Count | None = None
    multiplied: Count | None = None


class BuildSummary(Form):
    """Counts over an engine's layers."""

    layers: Count
    read_from: str
    coded: Count
    held: Count | None
    not_held: list[str] | None
    not_found: list[str] = []  # of a version that did not tell these apart
    int8: Products
    int4: Products
    float: Count | None
    sparse: Sparse
    line: str


class InEngine(Form):
    """What an engine holds of a weight."""

    dtype: str | None
    bytes: Count | None
    fused: bool | None
    held: bool
    sparse_chosen: bool | None
    sparse_eligible: bool | None
    note: str | None
    tactic: str | None


class BuildRow(Form):
    """One layer of a build's layers.json."""

    name: str
    placement: str
    reason: str
    fits_2_4: bool
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    engine: InEngine


class BuildList(Form):
    """A build's layers.json."""

    summary: BuildSummary
    layers: list[BuildRow]


class OlderRow(Form):
    """One layer there, as an older version wrote it."""

    name: str
    placement: str
    reason: str


class OlderBuildList(Form):
    """A build's layers.json of a version that counted less: told by the summary, which has no `line`."""

    summary: dict[str, Any]
    layers: list[OlderRow]


Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class MetricFigures(Form):
    """Figures of the check `metric`; those of further metrics stand below their names."""

    onnx: float | None = None
    accuracy_interval: Interval | None = None
    interval: Interval | None = None
    certain: bool | None = None


class CheckRow(Form):
    """One check of a verdict."""

    name: str
    status: Literal["pass", "fail", "not checked"]
    detail: str
    figures: dict[str, Any]

    @model_validator(mode="after")
    def _figures(self) -> CheckRow:
        if self.name == "metric":
            for figures in (self.figures, *(self.figures[name] for name in WORDS if name in self.figures)):
                MetricFigures.model_validate(figures)
        return self


class VerdictFile(Form):
    """verify.json."""

    verdict: Literal["pass", "fail"]
    checks: list[CheckRow]
    required: list[dict[str, Any]] = []


_FORMS: dict[tuple[str, str], type[Form]] = {
    ("train", "metrics.json"): Metrics,
    ("export", "layers.json"): ExportList,
    ("verify", "verify.json"): VerdictFile,
}


def form_of(name: str, raw: Any) -> type[Form]:
    """Return the form of a finished stage's JSON file.

    Args:
        name: `train/metrics.json`, `export/layers.json`, `build/TARGET/layers.json`, `verify/TARGET/verify.json`, …
        raw: What it holds, which tells versions apart.
    """
    stage, file = name.partition("/")[0], name.rpartition("/")[2]
    if (stage, file) == ("build", "layers.json"):
        summary = raw.get("summary") if isinstance(raw, dict) else None
        return OlderBuildList if isinstance(summary, dict) and "line" not in summary else BuildList
    return _FORMS.get((stage, file), Form)


def committed_json(path: Path, name: str) -> Any:
    """Return a finished stage's JSON file as it is, proved to have its form.

    Args:
        path: The file, of which the manifest has the sha256.
        name: Its name in the run folder.

    Raises:
        ArtifactError: If it is anything else; file and key are named.
    """
    try:
        raw = read_json(path)
        _formed(raw, form_of(name, raw))
        return raw
    except (OSError, ValueError) as error:
        raise _unlike(path, error, f"Make it anew with `slope-compile {name.partition('/')[0]} … --force`.") from None


def read_committed(path: Path, form: type[F], remedy: str) -> F:
    """Return a JSON file in its form.

    Args:
        path: The file.
        form: Which.
        remedy: What to do if it is anything else.

    Raises:
        ArtifactError: If it cannot be read, or is anything else; the key is named.
    """
    try:
        return _formed(read_json(path), form)
    except FileNotFoundError:
        raise ArtifactError(f"{path.name} is missing.", remedy) from None
    except (OSError, ValueError) as error:
        raise _unlike(Path(path.name), error, remedy) from None


def _unlike(path: Path, error: Exception, remedy: str) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read: {str(error)[:300].rstrip('.')}.", remedy)


def _formed(raw: Any, form: type[F]) -> F:
    """Return a document in its form; raises ValueError, naming the key, if it is none."""
    for place, value in _leaves(raw):
        if problem := _problem(value):
            raise ValueError(f"{place or 'the file'} is {problem}")
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place, told = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(": ".join(filter(None, (place, told)))) from None


def _leaves(raw: Any) -> Iterator[tuple[str, Any]]:
    """Yield every text and number of a document with its place in it, and every key."""
    waiting: list[tuple[str, Any]] = [("", raw)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            yield from ((place, key) for key in value)
            waiting += [(f"{place}.{key}".lstrip("."), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{place}.{index}".lstrip("."), inner) for index, inner in enumerate(value)]
        else:
            yield place, value


def _problem(value: Any) -> str:
    """Return what is wrong with a text or number, whatever is read of it; empty: nothing."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "half a character, which nothing can write"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is no number of ours"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"
    return ""
