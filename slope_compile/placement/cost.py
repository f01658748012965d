"""What a placement costs: a roofline, from the target's published peaks. A rule of thumb to rank with, no measurement.

    time    = max(moved / bandwidth, work / peak)
    moved   = weight bytes + batch · (elements read · their size + elements written · their size)
    work    = 2 · batch · positions · elements of the weight     [operations]

Letters as in the code: `moved` in bytes, `bandwidth` in bytes a second, `peak` in operations a second of the type that
is multiplied. Three things change a placement's terms:

* Sparse kernels, where rules.py calls them likely: peak · sparse_speedup, and 9/16 of the weight's bytes (half of the
  FP16 values and 2 bits to say where each of them was; 5/8 in INT8).
* A weight that is fused into a matrix product is dequantized inside the kernel: the work takes 4/3 as long. NVIDIA
  measured 0.75 to 0.88 of FP16's throughput at batch 8 to 64 for INT4 weights (Model Optimizer's benchmarks, H200).
* A weight that is dequantized by a layer of its own is written in the activations' type and read again: two more
  passes over it.

What is fused (`is_fused`): TensorRT documents INT4 in matrix products, nothing else. TensorRT-RTX 1.7.1 was seen to
fuse INT8 in products of several rows, and INT4 in two or more blocks per channel. A Cast behind the float32 scales
would keep INT4 apart, so a product with INT4 blocks computes in FP32 (TF32), whatever its neighbours do.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from slope_compile.placement.layers import Layer
from slope_compile.placement.rules import INT4, INT8, SPARSE, is_padded, sparse_doubt, storage
from slope_compile.placement.situation import Situation
from slope_compile.qdq.tensors import element_bits
from slope_compile.recipe import Placement

DEQUANTIZATION = 4 / 3  # of the work's time, from 0.75
SPARSE_BYTES = {"FLOAT16": Fraction(9, 16), "BFLOAT16": Fraction(9, 16), "INT8": Fraction(5, 8)}
WEIGHT_ONLY: tuple[Placement, ...] = ("int4-weight", "int8-weight", "int4-storage")
TIE = 0.05  # what differs by less is the same to a model this coarse
_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Cost:
    """What one placement of one layer costs at the opt batch.

    Args:
        weight: Bytes of codes and scales in the engine.
        moved: Bytes that go through the GPU's memory.
        memory_s: Seconds that moving takes.
        compute_s: Seconds that the products take.
        sparse: Whether sparse kernels were counted on.
    """

    weight: int
    moved: int
    memory_s: float
    compute_s: float
    sparse: bool

    @property
    def seconds(self) -> float:
        """The longer of both."""
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> Literal["memory", "compute"]:
        """What takes longer."""
        return "memory" if self.memory_s >= self.compute_s else "compute"


def cost(placement: Placement, layer: Layer, situation: Situation) -> Cost:
    """Return what a possible placement of a layer costs.

    Args:
        placement: One of `possible(layer, situation)`.
        layer: The weight and its operators.
        situation: The target, its backend, the opt batch and the activations' type.
    """
    container, block_size = storage(placement, layer, situation)
    fused = is_fused(placement, layer, situation)
    sparse = placement in SPARSE and sparse_doubt(placement, layer, situation) is None
    precision = "fp32" if placement == "int4-weight" and block_size else situation.precision
    real = _FLOAT_BYTES[precision]
    elements = layer.elements
    if is_padded(layer, block_size):
        elements = elements // layer.reduction * (-(-layer.reduction // block_size) * block_size)

    codes = -(-elements * element_bits(container) // 8)
    scales = _scale_bytes(placement, layer, block_size)
    moved = scales + (int(codes * SPARSE_BYTES[container]) if sparse else codes)
    if placement in WEIGHT_ONLY and not fused:
        moved += 2 * elements * real
    moved += situation.batch * _activation_bytes(placement, layer, real)

    target = situation.target
    peak = target.tflops["int8" if placement in INT8 else "fp32" if precision == "fp32" else "fp16"] * 1e12
    work = 2 * situation.batch * layer.positions * elements * (DEQUANTIZATION if fused else 1)
    compute_s = work / (peak * (target.sparse_speedup if sparse else 1))
    return Cost(codes + scales, moved, moved / (target.bandwidth_gbs * 1e9), compute_s, sparse)


def is_fused(placement: Placement, layer: Layer, situation: Situation) -> bool:
    """Return whether codes are dequantized inside the kernel that multiplies with them.

    Args:
        placement: A possible one.
        layer: The weight and its operators.
        situation: Who builds.
    """
    if not layer.is_gemm or placement not in WEIGHT_ONLY:
        return False
    if placement == "int4-weight":
        return 0 < storage(placement, layer, situation)[1] < layer.reduction or not situation.backend.rtx
    return situation.backend.rtx


def _activation_bytes(placement: Placement, layer: Layer, real: int) -> int:
    """Return the bytes read and written for one image; INT8 where the operator reads and writes it."""
    read = layer.inputs * (1 if layer.quantized_input else real)
    written = layer.outputs * (1 if placement in INT8 and layer.quantized_output else real)
    return read + written


def _scale_bytes(placement: Placement, layer: Layer, block_size: int) -> int:
    if placement not in (*INT4, *INT8, "int8-weight"):
        return 0
    return 4 * layer.channels * (-(-layer.reduction // block_size) if block_size else 1)
