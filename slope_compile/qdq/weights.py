"""One weight of an ONNX graph: what is stored, how it is dequantized, and which way its consumer reduces it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slope_compile.compression.groups import BLOCK
from slope_compile.errors import ArtifactError
from slope_compile.qdq.tensors import INTEGER_BITS, REMEDY


@dataclass(frozen=True)
class Step:
    """A Transpose (dims: its permutation) or a Reshape (dims: the new shape) between a weight and its consumer."""

    kind: Literal["transpose", "reshape"]
    dims: tuple[int, ...]

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the array after this step; a view where numpy can."""
        return array.transpose(self.dims) if self.kind == "transpose" else array.reshape(self.dims)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after this step."""
        return tuple(shape[axis] for axis in self.dims) if self.kind == "transpose" else self.dims

    def axis_before(self, axis: int, shape: tuple[int, ...]) -> int | None:
        """Return the axis of `shape`, the shape before this step, that becomes `axis`; None if a Reshape cuts it."""
        if self.kind == "transpose":
            return self.dims[axis]
        # An axis survives a Reshape if its length and the number of elements behind it stay.
        length, behind = self.dims[axis], math.prod(self.dims[axis + 1 :])
        same = [a for a, n in enumerate(shape) if n == length and math.prod(shape[a + 1 :]) == behind]
        return same[0] if same else None


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight as stored, with its way to the operator that multiplies with it.

    Attributes:
        name: The initializer's name without `.codes`, such as `layer1.0.conv1.weight`.
        stored: int8 or uint8 codes, or float32 (float64) values, in the layout that DequantizeLinear reads: the
            stored one, unless the graph itself turns the codes before it.
        dtype: ONNX's name of the stored element type: INT4, INT8, FLOAT16, ...
        scale: float32 as stored: scalar, [channels], or one per block; None without DequantizeLinear.
        zero_point: Integers in the scale's shape; None where the graph gives none, which means 0.
        axis: The axis of `stored` that the scales run along; None for a single scale.
        block_size: Elements of that axis which share a scale; 0 if every channel has one.
        value_dtype: Type that the consumer sees, to which values are rounded: FLOAT, FLOAT16, ...
        op: The consumer: Conv, ConvTranspose, MatMul or Gemm.
        node: The consumer's name.
        steps: What the graph does to the layout between `stored` and the consumer.
        consumed_axis: The input-channel axis, along which products are summed, in the consumer's layout.
    """

    name: str
    stored: npt.NDArray[Any]
    dtype: str
    scale: npt.NDArray[np.float32] | None
    zero_point: npt.NDArray[Any] | None
    axis: int | None
    block_size: int
    value_dtype: str
    op: str
    node: str
    steps: tuple[Step, ...]
    consumed_axis: int

    @property
    def codes(self) -> npt.NDArray[Any] | None:
        """The codes, int8 (uint8 for unsigned types); None for a weight stored as floats."""
        return self.stored if self.dtype in INTEGER_BITS else None

    @property
    def reduction_axis(self) -> int | None:
        """The input-channel axis in the stored layout; None if a Reshape leaves no such axis (then use `consumed`)."""
        shapes = [self.stored.shape]
        for step in self.steps:
            shapes.append(step.shape_after(shapes[-1]))
        axis: int | None = self.consumed_axis
        for step, shape in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            axis = None if axis is None else step.axis_before(axis, shape)
        return axis

    def consumed(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return an array of the stored shape in the consumer's layout."""
        for step in self.steps:
            array = step.apply(array)
        return array

    def values(self) -> npt.NDArray[Any]:
        """Return the dequantized weight in the stored layout, float32 (float64 where that is stored).

        value = (stored − zero_point) · scale, rounded to `value_dtype` (ONNX DequantizeLinear).
        """
        values = self.stored.astype(np.float32) if self.codes is not None else self.stored
        with np.errstate(all="ignore"):  # a file may hold NaN and infinity: that is for the checks to say
            if self.zero_point is not None:
                values = values - self._expand(self.zero_point.astype(np.float32))
            if self.scale is not None:
                values = values * self._expand(self.scale)
            return _rounded(values, self.value_dtype)

    def as_trained(self) -> CodedWeight:
        """Return the weight the way torch keeps it, output channels first, where its operator reads it otherwise.

        The operator decides, not the shape: a square matrix read the wrong way round must not look like the right one.
        """
        if self.op in ("Conv", "ConvTranspose"):
            return self._as_consumed()
        if self.op not in ("MatMul", "Gemm") or self.stored.ndim != 2 or self.reduction_axis != 0:
            return self
        return replace(
            self,
            stored=self.stored.T,
            scale=None if self.scale is None else self.scale.T,
            zero_point=None if self.zero_point is None else self.zero_point.T,
            axis=None if self.axis is None else 1 - self.axis,
            steps=(),
            consumed_axis=1,
        )

    def _as_consumed(self) -> CodedWeight:
        """Return the weight in the layout that its operator takes, where only transposes lie between."""
        if not self.steps or self.block_size or any(step.kind != "transpose" for step in self.steps):
            return self
        axis = self.axis
        for step in self.steps:
            axis = None if axis is None else step.dims.index(axis)
        return replace(self, stored=self.consumed(self.stored), axis=axis, steps=())

    def rows(self, rows: slice) -> CodedWeight:
        """Return some rows, without what the graph does to the layout.

        Args:
            rows: Along axis 0 of `stored`; whole blocks where the scales' blocks run along that axis.
        """
        return replace(
            self,
            stored=self.stored[rows],
            scale=None if self.scale is None else self._parameter_rows(self.scale, rows),
            zero_point=None if self.zero_point is None else self._parameter_rows(self.zero_point, rows),
            steps=(),
        )

    def _parameter_rows(self, parameter: npt.NDArray[Any], rows: slice) -> npt.NDArray[Any]:
        if self.axis is None or (self.axis and not self.block_size):
            return parameter
        if self.axis or not self.block_size:
            return parameter[rows]
        return parameter[rows.start // self.block_size : -(-rows.stop // self.block_size)]

    def channel_scale(self, channels_axis: int) -> npt.NDArray[np.float32] | None:
        """Return one scale per channel of `channels_axis`, float32 [channels]; None if channels mix several.

        A single scale is repeated; blocks that all repeat their channel's scale are one scale.
        """
        if self.scale is None:
            return None
        channels = self.stored.shape[channels_axis]
        if self.axis is None:
            return np.full(channels, self.scale.reshape(()), np.float32)
        if not self.block_size:
            return self.scale if self.axis == channels_axis else None
        rows = np.moveaxis(self.scale, channels_axis, 0).reshape(channels, -1)
        one_each = self.axis != channels_axis and rows.shape[1] > 0 and bool(np.all(rows == rows[:, :1]))
        return np.ascontiguousarray(rows[:, 0]) if one_each else None

    def _expand(self, parameter: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a scale or zero point in a shape that broadcasts against `stored`."""
        if self.axis is None:
            return parameter.reshape(())
        if self.block_size:
            repeated = np.repeat(parameter, self.block_size, axis=self.axis)
            return repeated.take(range(self.stored.shape[self.axis]), axis=self.axis)
        return parameter.reshape([-1 if a == self.axis else 1 for a in range(self.stored.ndim)])


def row_blocks(weight: CodedWeight) -> Iterator[slice]:
    """Yield slices of axis 0 of about `groups.BLOCK` elements each, and of whole blocks of scales."""
    length = weight.stored.shape[0]
    step = max(1, BLOCK * length // max(1, weight.stored.size))
    if weight.axis == 0 and weight.block_size:
        step = -(-step // weight.block_size) * weight.block_size
    yield from (slice(start, min(start + step, length)) for start in range(0, length, step))


def _rounded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype == "FLOAT16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BFLOAT16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return values


def check_quantization(weight: CodedWeight) -> None:
    """Refuse scales and zero points whose shapes do not fit the codes.

    Raises:
        ArtifactError: Naming the tensor, the shape and the axis.
    """
    shape = weight.stored.shape
    for what, parameter in (("scale", weight.scale), ("zero point", weight.zero_point)):
        if parameter is None:
            continue
        if weight.axis is None:
            expected: tuple[int, ...] = parameter.shape if parameter.size == 1 else ()
        elif weight.block_size:
            blocks = -(-shape[weight.axis] // weight.block_size)
            expected = (*shape[: weight.axis], blocks, *shape[weight.axis + 1 :])
        else:
            expected = (shape[weight.axis],)
        if parameter.shape != expected:
            raise ArtifactError(
                f"Tensor '{weight.name}' of shape {shape} has a {what} of shape {parameter.shape} along axis "
                f"{weight.axis} (block size {weight.block_size}); {expected} would fit.",
                REMEDY,
            )
