"""Where the rules come from, once each.

`observed` names what was seen with TensorRT-RTX 1.7.1, building for SM 8.0 without a GPU: it shares its parser and its
graph checks with TensorRT, and proves nothing about it.
"""

from __future__ import annotations

_DOCS = "TensorRT docs, inference-library"  # at docs.nvidia.com/deeplearning/tensorrt/latest

QUANTIZED_TYPES = f"{_DOCS}/work-quantized-types.html"
SCHEMES = f"{_DOCS}/quantized-types-schemes.html"
EXPLICIT = f"{_DOCS}/quantized-types-explicit-quantization.html"
RECOMMENDED = f"{EXPLICIT}, Q/DQ layer-placement recommendations"
SPARSITY = f"{_DOCS}/data-formats-tensors.html, structured sparsity"
HEADER = "NvInfer.h 11.1, IQuantizeLayer and IDequantizeLayer"
PARSER = "onnx-tensorrt, onnxOpImporters.cpp"
ONNX = "onnx.ai/onnx/operators"


def issue(number: int) -> str:
    """Return the address of a TensorRT issue."""
    return f"github.com/NVIDIA/TensorRT/issues/{number}"


def observed(what: str) -> str:
    """Return a source that is an observation of ours."""
    return f"observed with TensorRT-RTX 1.7.1: {what}"
