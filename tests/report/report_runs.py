"""A whole run, small and made up, of the shapes that the stages write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from slope_compile.report.page import RunData, SizeRow

# (name, shape, bits, pattern): the shapes of a ResNet-18 with a small stem.
LAYERS: list[tuple[str, tuple[int, ...], int, str | None]] = [
    ("conv1", (64, 3, 3, 3), 8, None),
    *((f"layer1.{b}.conv{c}", (64, 64, 3, 3), 4, "2:4") for b in (0, 1) for c in (1, 2)),
    ("layer2.0.conv1", (128, 64, 3, 3), 4, "2:4"),
    ("layer2.0.conv2", (128, 128, 3, 3), 4, "2:4"),
    ("layer2.0.downsample.0", (128, 64, 1, 1), 4, "2:4"),
    ("layer3.0.conv1", (256, 128, 3, 3), 4, "2:4"),
    ("layer4.0.conv1", (512, 256, 3, 3), 4, "2:4"),
    ("fc", (10, 512), 8, None),
]


def check(name: str, status: str, detail: str, **figures: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "detail": detail, "figures": figures}


def hop(
    name: str, start: str, end: str, relative: Any, tolerance: Any, status: str = "pass", **more: Any
) -> dict[str, Any]:
    ends = {"from": start, "to": end, "relative": relative, "tolerance": tolerance}
    return check(f"parity.{name}", status, f"16 samples within {relative}, allowed {tolerance}", **ends, **more)


VERDICT = {
    "verdict": "pass",
    "checks": [
        check("digest", "pass", "4 files are what the manifest says", files=4),
        check("codes", "pass", "11 tensors, bit-equal", tensors=11, worst="nan"),
        hop("folded", "trained", "folded", 0.0, 0.0),
        hop("onnx", "folded", "onnx", 7.24e-07, 8.52e-05),
        hop("onnx-default", "onnx", "onnx-default", 3.1e-07, None),
        hop("placed", "onnx", "placed", 0.000317, 0.00935),
        check("parity.engine", "not checked", "there is no GPU here"),
        check(
            "metric",
            "pass",
            "97.22 % against 97.50 %",
            onnx=0.9722,
            drop=0.00287,
            drop_from_compressed=0.0,
            interval_from_compressed=[-0.004, 0.004],
            budget=0.01,
            items=360,
            interval=[-0.0058, 0.0116],
            accuracy_interval=[0.9528, 0.9861],
            resamples=2000,
            certain=False,
        ),
    ],
}
STATISTICS = {"shape": [16, 128], "min": -4.1, "max": 6.25, "mean": 0.31, "std": 1.02, "zeros": 7, "not_finite": 0}
FAILED = {
    "verdict": "fail",
    "checks": [
        check("digest", "pass", "4 files are what the manifest says", files=4),
        check("pattern", "fail", "layer1.0.conv1.weight: 1 group of 4 holds 3 nonzeros, first at output channel 3"),
        hop("folded", "trained", "folded", 0.0, 0.0),
        hop(
            "onnx",
            "folded",
            "onnx",
            0.412,
            8.52e-05,
            "fail",
            diverges={
                "layer": "layer2.0.downsample.0",
                "operator": "Conv",
                "cause": "the scale is off by a power of two",
                "error": 0.98,
                "allowed": 8.52e-05,
                "reference": STATISTICS,
                "tested": {**STATISTICS, "max": 12.5, "mean": 0.62},
                "reproducer": "reproducer/parity.onnx",
                "command": "polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs.json",
            },
        ),
        check("parity.onnx-default", "not checked", "its reference, parity.onnx, failed"),
        check("parity.placed", "not checked", "its reference, parity.onnx, failed"),
        check("parity.engine", "not checked", "there is no GPU here"),
        check("metric", "not checked", "the validation images are not here"),
    ],
}


def statistics(index: int, epoch: int, dense: bool) -> dict[str, float]:
    if dense:
        return {"cosine": 0.99996, "sqnr_db": 41.5, "density": 0.98, "flip_rate": 0.0, "step": 0.0041}
    return {
        "cosine": 0.90 + 0.012 * epoch + 0.004 * math.sin(2.0 * index),
        "sqnr_db": 8.0 + epoch + 0.1 * index,
        "density": 0.47 - 0.002 * index,
        "flip_rate": 0.05 / (epoch + 1) + 0.001 * index,
        "step": 0.02 + 0.001 * index + 0.0007 * math.cos(epoch + index),
    }


def epochs() -> Iterator[dict[str, Any]]:
    for index in range(7):
        compressed = index >= 4
        yield {
            "epoch": index - 3 if compressed else index + 1,
            "phase": "slope" if compressed else "fp32",
            "loss": 2.1 * math.exp(-0.6 * index) + (0.25 if index == 4 else 0.55),
            "validation_loss": 0.3 * math.exp(-0.5 * index) + 0.05,
            "penalty": 0.09 - 0.01 * index if compressed else 0.0,
            "accuracy": 0.60 + 0.38 * (1 - math.exp(-0.9 * index)) - (0.03 if index == 4 else 0.0),
            "lr": 0.05 / (index + 1),
            "layers": {
                name: statistics(i, index - 4, pattern is None) for i, (name, _, _, pattern) in enumerate(LAYERS)
            }
            if compressed
            else {},
        }


def rows() -> Iterator[dict[str, Any]]:
    for index, (name, shape, bits, pattern) in enumerate(LAYERS):
        count = math.prod(shape)
        yield {
            "name": f"{name}.weight",
            "op": "Gemm" if name == "fc" else "Conv",
            "placement": "int8-weight" if pattern is None else "int4-storage",
            "reason": "8-bit codes need an INT8 container"
            if pattern is None
            else "TensorRT-RTX reads INT4 convolutions",
            "bits": bits,
            "pattern": pattern,
            "shape": list(shape),
            "bytes": {"fp32": 4 * count, "file": count * bits // 8 + 4 * shape[0]},
            "density": statistics(index, 2, pattern is None)["density"],
        }


def layer_errors(names: list[str] | None = None) -> dict[str, Any]:
    """A verification's layers.json: errors that grow with depth, one layer that a hop does not have."""
    names = names or [name for name, *_ in LAYERS]
    hops = [
        ("parity.folded", "trained", "folded"),
        ("parity.onnx", "folded", "onnx"),
        ("parity.placed", "onnx", "placed"),
    ]
    layers = []
    for index, name in enumerate(names):
        depth = (index + 1) / len(names)
        errors: dict[str, Any] = {
            "parity.folded": {"relative": 0.0, "allowed": 8.52e-05},
            "parity.onnx": {"relative": 9e-07 * depth, "allowed": 8.52e-05 * depth},
            "parity.placed": {"relative": 0.004 * depth**2, "allowed": 0.00935},
        }
        if index == 2:
            del errors["parity.placed"]
        layers.append({"name": name, "operator": "Gemm" if name == "fc" else "Conv", "errors": errors})
    return {"hops": [{"check": check, "from": a, "to": b} for check, a, b in hops], "layers": layers}


def direction() -> dict[str, Any]:
    """Counts in 200 bins: nearly all filters about 0.92 before and 0.95 after, and those of two dense layers near 1."""

    def counts(middle: int, most: int) -> list[int]:
        dense = [0] * 198 + [12, 62]
        return [int(most / (1 + abs(i - middle) ** 2)) * (abs(i - middle) < 9) + dense[i] for i in range(200)]

    edges = [i / 200 for i in range(201)]
    return {"edges": edges, "before": counts(184, 900), "after": counts(190, 700), "zero": {"before": 0, "after": 2}}


def make_run(**changes: Any) -> RunData:
    """A whole run; keyword arguments replace parts of it."""
    layers = list(rows())
    engine = {
        "layer": "Conv_1 + Relu",
        "layer_type": "kgen",
        "dtype": "Int4",
        "bytes": 18432,
        "computed_by": "Conv_1",
        "tactic": None,
        "fused": False,
        "sparse_eligible": None,
        "sparse_chosen": None,
        "held": True,
        "note": None,
    }
    built = [{**row, "engine": engine} for row in layers]
    built[1] |= {"placement": "int8-weight", "reason": "TensorRT has no INT4 convolution"}
    built[1] |= {"engine": {**engine, "dtype": "Int8", "sparse_chosen": True}}
    built[-1] |= {"engine": {**engine, "dtype": "Float", "held": False, "note": "declared INT8, engine holds Float"}}
    header = {"backend": "tensorrt-rtx", "version": "1.7.1", "target": "a100", "sm": "8.0"}
    line = (
        "8 of 11 layers eligible for sparse kernels (own count), chosen not checked: TensorRT-RTX chooses kernels at "
        "run time; INT4 fused in 0; float left in 1"
    )
    summary = {"coded": 11, "held": 10, "not_held": ["fc.weight"], "line": line}
    plan = [
        {
            "name": name,
            "kind": "linear" if name == "fc" else "conv",
            "shape": list(shape),
            "bits": bits,
            "pattern": pattern,
            "granularity": "tensor",
            "reason": "first or last layer: 8 bits, dense" if pattern is None else "2:4 and 4 bits, as the recipe asks",
        }
        for name, shape, bits, pattern in LAYERS
    ]
    parts: dict[str, Any] = {
        "name": "digits-resnet18",
        "recipe": {
            "model": {"name": "torchvision/resnet18", "classes": 10, "weights": None, "stem": "small"},
            "data": {"source": "digits", "size": 12},
            "compression": {"bits": 4, "pattern": "2:4", "regularizer": "cosine", "overrides": {}},
            "train": {"seed": 0, "lr": 0.02},
            "export": {"opset": 21},
            "build": {"targets": ["a100"], "batch": {"min": 1, "opt": 64, "max": 256}},
            "verify": {"metric_drop": 0.01},
        },
        "metrics": {
            "fp32": {"accuracy": 0.975, "loss": 0.081},
            "compressed": {"accuracy": 0.9722, "loss": 0.092},
            "epochs": list(epochs()),
            "plan": plan,
            "layers": {n: statistics(i, 2, p is None) for i, (n, _, _, p) in enumerate(LAYERS)},
            "classes": [str(digit) for digit in range(10)],
            "data": {"train": 1437, "validation": 360},
            "direction": direction(),
        },
        "layers": {"layers": layers},
        "builds": {"a100": {"header": header, "summary": summary, "layers": built}},
        "verdicts": {"a100": VERDICT},
        "packed": {f"{name}.weight": 1000 * (index + 1) for index, (name, *_) in enumerate(LAYERS)},
        "layer_errors": {"a100": layer_errors()},
        "sizes": [
            SizeRow("train", "FP32 weights", 44_696_104),
            SizeRow("train", "codes, nominal", 2_801_000),
            SizeRow("pack", "Packed file", 2_990_000),
            SizeRow("train", "codes, one byte each", 11_189_120, step=False),
            SizeRow("export", "ONNX file", 5_732_579),
            SizeRow("build/a100", "TensorRT engine", 6_011_212),
        ],
        "accuracies": {"fp32": 0.975, "compressed": 0.9722, "onnx": 0.9722},
        "versions": {"torch": "2.15.0", "onnx": "1.23.0"},
    }
    return RunData(**{**parts, **changes})
