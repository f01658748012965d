"""Takes out what torch wrote about the machine: stack traces, source paths, module hierarchies."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from slope_compile._version import __version__

PRODUCER = "slope-compile"


class CleanModel(ir.passes.InPlacePass):
    """Clears metadata and doc strings, names the producer, and sets the file version that the operator set needs.

    The bytes then depend on the model alone, not on where and by whom it was exported.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear everything that may hold metadata."""
        for holder in _holders(model):
            holder.metadata_props.clear()
            holder.doc_string = None
        model.graph.name = PRODUCER
        model.producer_name, model.producer_version = PRODUCER, __version__
        model.domain, model.model_version = None, None
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        model.ir_version = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No metadata and no doc string is left."""
        for holder in _holders(model):
            if holder.metadata_props or holder.doc_string:
                raise ir.passes.PostconditionError(f"{holder} still has metadata")


def _holders(model: ir.Model) -> Iterator[ir.Model | ir.Graph | ir.Node | ir.Value]:
    """Yield the model, its graphs, their nodes and values."""
    yield model
    for graph in model.graphs():
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs
