from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from export_models import CONVNET_BITS, convnet, give_codes

from slope_compile.events import Events
from slope_compile.export.float_graph import float_graph
from slope_compile.export.model import Files, export_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The small conv net, exported at opset 21 once for all tests; `float_graph` is the graph before the passes."""
    model = convnet()
    codes = give_codes(model, CONVNET_BITS)
    files = Files.inside(tmp_path_factory.mktemp("export"))
    inputs = torch.randn(5, 3, 12, 12)
    heard: list[dict[str, Any]] = []
    seen: list[onnx.ModelProto] = []

    def spy(*args: Any) -> ir.Model:
        graph = float_graph(*args)
        seen.append(ir.to_proto(graph))
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slope_compile.export.model.float_graph", spy)
        layers = export_model(model, codes, inputs, files, 21, Events(listeners=[heard.append]))
    return SimpleNamespace(
        model=model, codes=codes, files=files, inputs=inputs, layers=layers, events=heard, float_graph=seen[0]
    )


@pytest.fixture
def fresh_graph(exported: SimpleNamespace) -> Callable[[], ir.Model]:
    """Makes copies of the small conv net's float graph, as torch exports it."""
    return lambda: ir.from_proto(exported.float_graph)
