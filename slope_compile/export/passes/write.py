"""Writes the file, then reads its bytes back and proves the laws on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import CheckFailedError
from slope_compile.export.placement import Placement
from slope_compile.qdq.checks import Finding, check_model
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.weights import CodedWeight

EXTERNAL_OVER = 2_000_000_000  # bytes; a protobuf message may not reach 2 GiB


class WriteModel(ir.passes.InPlacePass):
    """Writes a model to disk, with its tensors in `FILE.data` beside it where one file would be too big.

    Args:
        path: The file to write.
        codes: Weight name -> the trained codes, which the bytes on disk must hold.
        placements: Weight name -> (operator, placement) of every weight.
        external_over: Bytes of tensors above which they go into their own file.

    Attributes:
        weights: What the reader found on disk.

    Raises:
        CheckFailedError: If what is on disk is not what was trained.
        OSError: If the disk is full or read-only.
    """

    def __init__(
        self,
        path: Path,
        codes: Mapping[str, CodedTensor],
        placements: Mapping[str, tuple[str, Placement]],
        external_over: int = EXTERNAL_OVER,
    ) -> None:
        self.weights: list[CodedWeight] = []
        self._path = path
        self._codes = codes
        self._placements = placements
        self._external_over = external_over

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the bytes; the same model gives the same bytes."""
        tensors = [value.const_value for value in model.graph.initializers.values()]
        if sum(tensor.nbytes for tensor in tensors if tensor is not None) > self._external_over:
            ir.save(model, self._path, external_data=f"{self._path.name}.data")
        else:
            self._path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        """The file is valid ONNX and its bytes hold every code and scale, within the laws, in the container placed."""
        try:
            onnx.checker.check_model(self._path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise CheckFailedError(f"{self._path.name} is not valid ONNX: {error}") from None
        self.weights = coded_weights(self._path)
        findings = check_model(self.weights, self._codes) + self._containers()
        if findings:
            told = "; ".join(str(finding) for finding in findings[:5])
            raise CheckFailedError(
                f"{self._path.name} does not hold what was trained ({len(findings)} findings): {told}"
            )

    def _containers(self) -> list[Finding]:
        """Return every weight that is not in the container it was placed in."""
        findings = []
        for weight in self.weights:
            _, placement = self._placements.get(weight.name, ("", None))
            if placement is not None and weight.dtype != placement.container:
                findings.append(Finding(weight.name, "container", f"{weight.dtype}, placed in {placement.container}"))
        return findings
