"""How each coded weight is stored in the exported file, which serves every target, and why.

A build then gives each weight the placement of its target (`slope_compile/placement`); values stay bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slope_compile.compression.codes import REDUCTION_AXIS, CodedTensor
from slope_compile.qdq.matrices import BLOCKS, GEMM
from slope_compile.qdq.pattern import fits_sparse_cores

INT2_OPSET = 25  # DequantizeLinear takes INT2 since then


@dataclass(frozen=True)
class Placement:
    """How a weight is stored.

    Attributes:
        name: `sparse-int8`, `int8`, `int4-storage`, `int4-weight`, `int8-weight` or `float`.
        reason: Why, in a sentence.
        container: ONNX element type of the codes: INT2, INT4, INT8; FLOAT for a weight that was left alone.
        block_size: Input channels that share a stored scale; 0 for one scale per output channel.
    """

    name: str
    reason: str
    container: str
    block_size: int = 0


def place(tensor: CodedTensor, op: str, opset: int, reads_int8: bool = False) -> Placement:
    """Return the placement of a coded weight.

    Args:
        tensor: Codes in torch's layout: K, C, R, S or out, in.
        op: The ONNX operator that multiplies with it.
        opset: The file's operator set.
        reads_int8: Whether every operator that multiplies with it reads a quantized activation.
    """
    shape = tuple(tensor.codes.shape)
    if reads_int8:
        # TensorRT multiplies INT8 with INT8 only: beside a quantized activation it takes no INT4 convolution.
        rides = f"the activation is INT8, so the {tensor.bits}-bit codes ride unchanged in INT8"
        if fits_sparse_cores(np.asarray(tensor.codes), REDUCTION_AXIS):
            return Placement("sparse-int8", f"{rides}; at most 2 of every 4 are not zero", "INT8")
        return Placement("int8", rides, "INT8")
    if tensor.bits > 4:
        return Placement("int8-weight", f"{tensor.bits}-bit codes need an INT8 container", "INT8")
    if math.prod(shape) % 2:
        elements = math.prod(shape)
        reason = f"{elements} elements, an odd number: TensorRT takes no odd sub-byte tensors, so INT8 holds the codes"
        return Placement("int8-weight", reason, "INT8")
    container = "INT2" if tensor.bits == 2 and opset >= INT2_OPSET else "INT4"
    if op not in GEMM:
        reason = f"TensorRT has no {container} convolution: {container} in the file, dequantized where it is used"
        return Placement("int4-storage", reason, container)
    channels = shape[1]
    block_size = next((block for block in BLOCKS if channels % block == 0), 0)
    if not block_size:
        reason = f"{channels} input channels are a multiple of neither 128 nor 64: one scale per output channel"
        return Placement("int4-storage", reason, container)
    reason = f"TensorRT fuses INT4 into the matrix product; the channel's scale is repeated per block of {block_size}"
    return Placement("int4-weight", reason, container, block_size)
