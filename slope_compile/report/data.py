"""What a report is made of: the documents of one run, as read from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SizeRow:
    """One size along the pipeline, in bytes.

    Args:
        stage: The stage it belongs to: `train`, `pack`, `export`, `build/TARGET` or a later one.
        what: What was weighed, such as `ONNX file`. The first row whose `what` begins with `FP32` is what all the
            others are compared with.
        bytes: Measured on the artifact, or (nominal sizes) counted from its codes.
        step: Whether it is a step from the FP32 model to what is deployed; others are listed, and no step starts there.
    """

    stage: str
    what: str
    bytes: int
    step: bool = True


@dataclass(frozen=True)
class RunData:
    """One run; what did not happen is None or an empty mapping and is shown as absent.

    Args:
        name: The run's name.
        recipe: The resolved recipe: section -> key -> value.
        metrics: train/metrics.json.
        layers: export/layers.json.
        builds: Target -> build/TARGET/layers.json.
        verdicts: Target -> verify/TARGET/verify.json.
        layer_errors: Target -> verify/TARGET/layers.json: the error of each layer's output at each hop of the chain.
        packed: Weight -> bytes of it in the packed file.
        sizes: In pipeline order.
        accuracies: The primary metric of `fp32`, `compressed` and `onnx`, shares of 1; None where not measured.
        metric: Its name, and its key in the metrics' epochs.
        other_metrics: Further metrics, each like `accuracies`.
        versions: Package -> version.
    """

    name: str
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any] | None = None
    layers: Mapping[str, Any] | None = None
    builds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer_errors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    packed: Mapping[str, int] = field(default_factory=dict)
    sizes: Sequence[SizeRow] = ()
    accuracies: Mapping[str, float | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    metric: str = "accuracy"
    other_metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the recipe, None where it has none."""
        return (self.recipe.get(section) or {}).get(key)

    @property
    def fp32_bytes(self) -> int | None:
        """Size that the others are compared with."""
        return next((row.bytes for row in self.sizes if row.what.startswith("FP32")), None)
