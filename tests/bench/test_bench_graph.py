from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slope_compile.bench.cuda_graph import CaptureError, CudaGraph
from slope_compile.bench.runner import filled


class Library:
    """libcudart, of which some calls may fail."""

    def __init__(self, **failing: int) -> None:
        self.failing, self.calls = failing, []

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> int:
            self.calls.append(name)
            return self.failing.get(name, 0)

        return call


def test_captured_once_and_launched() -> None:
    library, recorded = Library(), []
    graph = CudaGraph(library, 1, lambda: recorded.append(1))
    graph.launch()
    graph.launch()
    assert recorded == [1]
    assert library.calls == [
        "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags", "cudaGraphLaunch",
        "cudaGraphLaunch",
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_what_cuda_refuses_is_named(call: str) -> None:
    library = Library(**{call: 900})
    with pytest.raises(CaptureError, match=f"{call.removesuffix('WithFlags')} returned CUDA error 900"):
        CudaGraph(library, 1, lambda: None)
    assert library.calls[-1] == "cudaGetLastError"


def test_an_engine_that_cannot_be_captured_ends_the_capture() -> None:
    def record() -> None:
        raise RuntimeError("a layer synchronizes")

    library = Library()
    with pytest.raises(CaptureError, match="cannot run inside a capture: a layer synchronizes"):
        CudaGraph(library, 1, record)
    assert "cudaStreamEndCapture" in library.calls


def test_inputs() -> None:
    generator = np.random.default_rng(0)
    floats = filled(np.zeros((2, 3), np.float16), generator)
    assert (floats.dtype, bool(floats.any())) == (np.float16, True)
    assert not filled(np.zeros((2, 3), np.int64), generator).any()  # an index into a table: 0 is always one
