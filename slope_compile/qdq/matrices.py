"""Matrix products in ONNX, and the INT4 blocks that TensorRT takes in them."""

from __future__ import annotations

GEMM = ("MatMul", "Gemm")
BLOCKS = (128, 64)  # the cheaper one first (TensorRT documentation, quantized types: "supported block sizes")
