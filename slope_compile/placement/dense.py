"""The same model without what compression gave it: float constants and no quantizers, to measure an engine against."""

from __future__ import annotations

from pathlib import Path

from slope_compile.errors import BackendError
from slope_compile.placement.rounding import exact_values
from slope_compile.placement.save import load_graph, save_graph
from slope_compile.qdq.reader import coded_weights

NAME = "dense.onnx"


def dense_twin(onnx: Path, folder: Path) -> Path:
    """Write FOLDER/dense.onnx: a model's operators with FLOAT weights and float activations.

    The weights keep their values, zeros included: build it without sparse kernels to have a dense engine. Its
    precision is chosen when it is built, as any other model's.

    Args:
        onnx: The exported model.
        folder: Where the file goes.

    Raises:
        ArtifactError: If the model is malformed.
        BackendError: If a weight is used by more than what multiplies with it.
    """
    weights = [weight for weight in coded_weights(onnx) if weight.codes is not None]
    model = load_graph(onnx)
    import onnx_ir as ir  # a second, and no device needs it

    from slope_compile.placement.passes.fold import FoldWeights, RemoveQuantizers

    try:
        FoldWeights({weight.name: exact_values(weight) for weight in weights})(model)
        RemoveQuantizers()(model)
    except ir.passes.InvariantError as error:
        raise BackendError(
            f"{onnx} has no dense twin: {error}.", "Measure it without the comparison, or export it with slope-compile."
        ) from None
    return save_graph(model, folder / NAME)
