"""The levels are true: what is an error TensorRT-RTX refuses, what `build` is said to mend it mends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from lint_cases import BROKEN, codes_cast
from lint_graphs import situation

from slope_compile.errors import BackendError
from slope_compile.lint.check import lint
from slope_compile.placement.apply import placed_model
from slope_compile.placement.choose import choose_places
from slope_compile.qdq.reader import coded_weights

# These stop TensorRT-RTX 1.7.1 at SM 8.0, part of the detail -> of BROKEN above. The other errors are what it lets
# through though it computes something else, what TensorRT's documents forbid, or files that are no valid ONNX.
REFUSED = {
    "scale-positive": ("at [3]: 0.0", "[]: nan", "-0.5"),
    "scale-shape": ("(16,) would fit", "(2, 64) would fit"),
    "zero-point": ("zero point 3", "zero point 0 to 1"),
    "uint8": ("the UINT8 tensor 'x'", "the UINT8 tensor 'w.codes'"),
    "narrow-type": ("INT2 [16, 8, 3, 3]", "UINT4", "UINT16"),
    "target-type": ("has no FLOAT8E4M3FN",),
    "odd-count": ("45 elements", "9 elements"),
    "int32-dequantize": ("INT32 tensor 'i'",),
    "int4-int8-input": ("its activation is quantized",),
    "mixed-factors": ("multiplies FLOAT with FLOAT16",),
    "block-axis": ("along axis 1",),
    "operator": ("does not build QLinearMatMul, 2 times",),
    "tensor-data": ("needs 4 bytes, holds 3",),
}
MENDED = [case for case in BROKEN if case[1] == "warning" and case[0] in {
    "int4-block-size", "block-axis", "block-tail", "block-type", "uint8", "narrow-type", "odd-count", "int4-conv",
    "int4-int8-input",
}]  # fmt: skip
BUILD = """
import json, sys
import tensorrt_rtx as trt
def builds(path):
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    if not trt.OnnxParser(network, logger).parse(open(path, "rb").read()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    return builder.build_serialized_network(network, config) is not None
print(json.dumps({path: builds(path) for path in sys.argv[1:]}))
"""


def test_what_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    files = {}
    for number, (rule, _, detail, bad, good) in enumerate(BROKEN):
        if detail in REFUSED.get(rule, ()):
            for kind, make in (("bad", bad), ("good", good)):
                path = tmp_path / f"{number}.{rule}.{kind}.onnx"
                onnx.save(make(), path)
                files[str(path)] = kind == "good"
    assert len(files) >= 2 * sum(map(len, REFUSED.values()))
    done = subprocess.run([sys.executable, "-c", BUILD, *files], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == files


@pytest.mark.parametrize(("rule", "level", "detail", "bad", "good"), MENDED)
def test_what_is_mended(tmp_path: Path, rule, level, detail, bad, good) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m.onnx"
    onnx.save(bad(), path)
    weights = coded_weights(path)
    here = situation()
    assert any(v.rule == rule and "slope-compile build" in v.remedy for v in lint(path, here))
    placed = placed_model(path, weights, choose_places(path, weights, here), here, tmp_path)
    assert [v for v in lint(placed, here) if v.level == "error" or "slope-compile build" in v.remedy] == []


def test_what_cannot_be_moved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(codes_cast(), path)
    here, weights = situation(), coded_weights(path)
    assert [v.level for v in lint(path, here) if v.rule == "int4-conv"] == ["error"]
    with pytest.raises(BackendError, match="codes of 'w' are used by Cast"):
        placed_model(path, weights, choose_places(path, weights, here), here, tmp_path)
