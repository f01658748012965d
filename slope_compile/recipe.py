"""The recipe: one YAML file that says what to train, compress, export, build and verify.

Precedence: command-line option, `--set a.b=v`, the file, the default. Unknown keys are refused with the nearest name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slope_compile.errors import RecipeError, nearest

MAX_RECIPE_BYTES = 1_000_000
Positive = Annotated[int, Field(ge=1)]
MAX_EXTENT = 2**31 - 1  # of an axis: TensorRT-RTX 1.7.1 refuses 2^31 in a profile and takes 2^40 for another
BatchSize = Annotated[int, Field(ge=1, le=MAX_EXTENT)]


class Section(BaseModel):
    """A part of a recipe: unknown keys refused, values immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model: `torchvision/NAME`, `timm/NAME` or `file.py:function`."""

    name: str
    classes: Positive | None = None  # None: as many as the data set has
    weights: str | None = None  # a name the library knows, a local .safetensors file, or none
    stem: Literal["default", "small"] = (
        "default"  # small: 3x3 stride-1 first conv, no max-pool (images of 64 px and less)
    )
    proposals: Positive = 1000  # detection: region proposals that reach the heads, in evaluation and in the export
    detections: Positive = 100  # detection: objects an image, at most


class DataSection(Section):
    """Which data: `digits`, `imagefolder:DIR`, `fake:N`, `coco:DIR` or `shapes:N`; images become 3 x size x size."""

    source: str
    size: Positive = 224
    batch: Positive = 64
    workers: Annotated[int, Field(ge=0)] = 2
    augment: Literal["none", "light", "imagenet"] = "light"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2  # share held out where the source has no split of its own
    bad_images: Literal["refuse", "skip"] = "refuse"


class CompressionSection(Section):
    """How the weights are compressed; `overrides` maps a layer-name pattern to keys of this section, or to `off`."""

    method: Literal["slope"] = "slope"
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    pattern: str | None = "2:4"
    regularizer: Literal["none", "l2", "sr-ste", "cosine"] = "cosine"
    strength: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    granularity: Literal["tensor", "channel"] = "tensor"
    first_last_bits: Annotated[int, Field(ge=2, le=8)] | None = 8  # None: left in float
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None  # None: activations stay in float
    quantize_outputs: bool = False  # with activation_bits: quantize what layers return too, so that chains stay INT8
    permute: bool = False  # order input channels before masking so that the pattern keeps more magnitude
    strict: bool = False  # refuse a model with a layer that cannot be compressed, instead of leaving it in float
    overrides: dict[str, Literal["off"] | dict[str, Any]] = Field(default_factory=dict)

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool):
            # YAML 1.1 reads an unquoted 2:4 as a sexagesimal number (2 * 60 + 4).
            value = f"{value // 60}:{value % 60}"
        if value is None or value == "none":
            return None
        parse_pattern(value)
        return str(value)

    @field_validator("overrides", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML 1.1 reads an unquoted off as false.
        return {k: "off" if v is False else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("overrides")
    @classmethod
    def _overrides(cls, value: dict[str, Any]) -> dict[str, Any]:
        allowed = ("bits", "pattern", "granularity", "activation_bits")
        for layer, keys in value.items():
            if keys == "off":
                continue
            for key in keys:
                if key not in allowed:
                    raise ValueError(f"override {layer!r}: unknown key '{key}'. {nearest(key, allowed)}")
            cls(**keys)
        return value


class TrainSection(Section):
    """FP32 training for `pretrain_epochs`, then compressed fine-tuning for `epochs`."""

    pretrain_epochs: Annotated[int, Field(ge=0)] = 20
    epochs: Positive = 20
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.01
    pretrain_lr: Annotated[float, Field(gt=0)] | None = None  # None: lr
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-4
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accumulate: Positive = 1  # parts into which each rank splits its share of data.batch, one after the other
    compile: bool = False  # torch.compile
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class ExportSection(Section):
    """The ONNX file and the golden inputs and outputs beside it."""

    opset: Annotated[int, Field(ge=21, le=25)] = 21
    samples: Positive = 16


class BatchRange(Section):
    """The engine's optimization profile along the batch axis; kernels are chosen at `opt`."""

    min: BatchSize = 1
    opt: BatchSize | None = None  # None: the target's usual deployment batch
    max: BatchSize | None = None  # None: 64, or `opt` where that is more

    @model_validator(mode="after")
    def _ordered(self) -> BatchRange:
        given = [size for size in (self.min, self.opt, self.max) if size is not None]
        if given != sorted(given):
            raise ValueError(f"min <= opt <= max does not hold for {self.min}, {self.opt}, {self.max}")
        return self

    def resolved(self, deployment: int) -> tuple[int, int, int]:
        """Return (min, opt, max).

        Args:
            deployment: The target's usual batch, for `opt` where the recipe has none; kept within min and max.
        """
        opt = self.opt if self.opt is not None else max(self.min, min(deployment, self.max or deployment))
        return self.min, opt, self.max if self.max is not None else max(64, opt)


Placement = Literal["sparse-int8", "int8", "sparse-fp16", "int4-weight", "int8-weight", "int4-storage", "float"]


class BuildSection(Section):
    """Which engines, and how: one set of keys for every TensorRT; what a target cannot take is refused, and why."""

    targets: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["a100"])
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    batch: BatchRange = Field(default_factory=BatchRange)
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of activations that are not quantized
    placement: dict[str, Placement] = Field(default_factory=dict)  # layer-name pattern -> placement
    require: list[str] = Field(default_factory=list)  # what the engine must hold, such as sparse>=10
    timing_cache: str | None = None  # None: the one of the last build for this target
    workspace_gib: Annotated[float, Field(gt=0)] | None = None  # None: all that the GPU has
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None  # None: TensorRT's own default
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    refit: bool = False  # weights can be replaced in the engine
    strip: bool = False  # an engine without its weights, to be refitted
    dla: Annotated[int, Field(ge=0)] | None = None  # Orin: which DLA core; what it cannot run falls back to the GPU


class BaselineSection(Section):
    """How much worse than its baseline, the last release, a run may be; all relative but the layers."""

    size: Annotated[float, Field(ge=0)] = 0.02  # bytes of the ONNX file and of each engine
    metric_drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    latency: Annotated[float, Field(ge=0)] = 0.05  # median of `bench`
    sparse_layers: Annotated[int, Field(ge=0)] = 0  # layers that may lose their sparse kernel


class VerifySection(Section):
    """What the verdict allows, and what it must have checked."""

    metric_drop: Annotated[float, Field(ge=0, le=1)] = 0.01  # relative, against the FP32 model
    require: list[str] = Field(default_factory=list)  # checks that must pass: `not checked` is a failure
    baseline: BaselineSection = Field(default_factory=BaselineSection)


class Recipe(Section):
    """A whole recipe; only `model.name` and `data.source` have no default."""

    model: ModelSection
    data: DataSection
    compression: CompressionSection = Field(default_factory=CompressionSection)
    train: TrainSection = Field(default_factory=TrainSection)
    export: ExportSection = Field(default_factory=ExportSection)
    build: BuildSection = Field(default_factory=BuildSection)
    verify: VerifySection = Field(default_factory=VerifySection)

    def to_yaml(self) -> str:
        """Return the resolved recipe, every default spelt out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self, *sections: str) -> str:
        """Return the sha256 of the named sections (all of them if none is named) as canonical JSON."""
        dump = self.model_dump(mode="json")
        chosen = {name: dump[name] for name in (sections or dump)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def parse_pattern(text: str) -> tuple[int, int]:
    """Return (n, m) of an `n:m` pattern, at most n nonzeros in every m.

    Raises:
        ValueError: If the text is not `n:m` with 1 <= n <= m <= 64.
    """
    n, colon, m = str(text).partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m) <= 64):
        raise ValueError(f"'{text}' is no n:m pattern with 1 <= n <= m <= 64, such as 2:4")
    return int(n), int(m)


def shipped_recipes() -> dict[str, str]:
    """Return the recipes inside the package: name -> YAML text."""
    folder = resources.files("slope_compile") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(source: str | Path, sets: Iterable[str] = ()) -> Recipe:
    """Read a recipe file or a shipped recipe and apply `a.b=v` settings.

    Args:
        source: A path, or the name of a shipped recipe.
        sets: `section.key=value`; the value is YAML.

    Raises:
        RecipeError: If the file is missing, too big, not YAML, or holds an unknown key or a value out of range.
    """
    raw = _parse(_read(source), str(source))
    for setting in sets:
        _apply(raw, setting)
    return recipe_from(raw, str(source))


def recipe_from(raw: Mapping[str, Any], source: str) -> Recipe:
    """Validate a mapping into a recipe; `source` names it in errors.

    Raises:
        RecipeError: If a key is unknown, missing, or a value out of range.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            f"{source}: {_explain(error)}", "`slope-compile recipes show digits-resnet18` shows every key."
        ) from None


def build_section(keys: Mapping[str, Any], sets: Iterable[str], source: str) -> BuildSection:
    """Return a recipe's `build` on its own, for a model that belongs to no run.

    Args:
        keys: Keys of the section; the others have their defaults.
        sets: `build.key=value`; the value is YAML.
        source: Names the section in errors.

    Raises:
        RecipeError: If there is no such key, a value is out of range, or a setting is of another section.
    """
    raw = {"model": {"name": "none"}, "data": {"source": "none"}, "build": dict(keys)}  # what every recipe must have
    for setting in sets:
        if not setting.strip().startswith("build."):
            raise RecipeError(f"--set {setting}: {source} belongs to no run.", "Only keys of `build` can be set.")
        _apply(raw, setting)
    return recipe_from(raw, source).build


def _read(source: str | Path) -> str:
    shipped = shipped_recipes()
    if str(source) in shipped:
        return shipped[str(source)]
    path = Path(source)
    if not path.is_file():
        looks_like_path = path.suffix in (".yaml", ".yml") or "/" in str(source)
        hint = "Check the path." if looks_like_path else nearest(str(source), shipped)
        raise RecipeError(f"There is no recipe '{source}'.", hint)
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise RecipeError(
                f"{path} is {size} bytes; a recipe has at most {MAX_RECIPE_BYTES}.", "Is it another file?"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}.", "Check the file.") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{source} is not YAML: {reason}.", "Mend that line.") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{source} holds {type(raw).__name__}, not a mapping of sections.",
            "See `slope-compile recipes show digits-resnet18`.",
        )
    return raw


def _apply(raw: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise RecipeError(f"--set {setting}: not of the form section.key=value.", "Example: --set compression.bits=2")
    node: dict[str, Any] = raw
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {setting}: '{part}' is a value, not a section.", "Shorten the key.")
        node = child
    try:
        # A pattern such as 2:4 would be read as a base-60 number.
        node[parts[-1]] = value if parts[-1] == "pattern" and value != "null" else yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {setting}: the value is not YAML.", "Quote it.") from None


def _explain(error: ValidationError) -> str:
    """One sentence for the first few errors: where, what, the offending value, the nearest key."""
    sentences = []
    for item in error.errors()[:3]:
        # pydantic adds the union branch ('int', "literal['auto']") to the location: keep the recipe's own keys only.
        where = ".".join(str(part) for part in item["loc"] if not _is_branch(str(part)))
        if item["type"] == "extra_forbidden":
            section, _, key = where.rpartition(".")
            known = _keys_of(section)
            sentences.append(f"unknown key '{where}'. {nearest(key, known)}")
        elif item["type"] == "missing":
            sentences.append(f"'{where}' is required.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            sentence = f"'{where}' is {item['input']!r}: {message[0].lower()}{message[1:]}."
            if sentence not in sentences:
                sentences.append(sentence)
    return " ".join(sentences)


def _is_branch(part: str) -> bool:
    return part in ("int", "float", "dict", "none", "str") or part.startswith(("literal[", "dict[", "constrained"))


def _keys_of(section: str) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in filter(None, section.split(".")):
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)
