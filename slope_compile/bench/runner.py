"""An engine that runs on this machine's GPU, inputs and outputs already there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.bench.cuda_graph import CaptureError, CudaGraph
from slope_compile.errors import BackendError


class EngineRunner:
    """Runs an engine at fixed shapes, as a CUDA graph where it can be captured; copies nothing while it is measured.

    Args:
        trt: The backend's module.
        path: The engine.
        sha256: What its bytes must be: an engine is code.
        shapes: Input -> shape, of inputs with dynamic axes.

    Raises:
        BackendError: If it is another file, does not load, or does not run at these shapes.
    """

    def __init__(self, trt: Any, path: Path, sha256: str, shapes: Mapping[str, list[int]]) -> None:
        from polygraphy import cuda
        from polygraphy.backend.trt import get_trt_logger

        engine = path.read_bytes()
        if hashlib.sha256(engine).hexdigest() != sha256:
            raise BackendError(f"{path.name} is not the engine that was built: it was edited.", "Build it again.")
        runtime = trt.Runtime(get_trt_logger())
        self._engine = runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise BackendError(f"{path.name} does not load: it is damaged, or of another version.", "Build it again.")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{path.name} does not run: the GPU has too little free memory?", "Free some.")
        self._cuda, self._stream = cuda.wrapper(), cuda.Stream()
        self._buffers = self._bind(trt, cuda, path, shapes)
        self._enqueue()  # TensorRT prepares what it needs for the shapes: a graph cannot hold that
        self.wait()
        self.graph: CudaGraph | None = None
        self.no_graph: str | None = None
        try:
            self.graph = CudaGraph(self._cuda.handle, self._stream.ptr, self._enqueue)
            self.graph.launch()
            self.wait()
        except CaptureError as error:
            self.graph, self.no_graph = None, str(error)

    def launch(self) -> None:
        """Start one inference."""
        if self.graph is not None:
            self.graph.launch()
        else:
            self._enqueue()

    def wait(self) -> None:
        """Return when everything on the stream is done."""
        self._stream.synchronize()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.ptr):
            raise BackendError("TensorRT does not run the engine at these shapes.", "Build it again.")

    def _bind(self, trt: Any, cuda: Any, path: Path, shapes: Mapping[str, list[int]]) -> list[Any]:
        """Give every input random numbers and every output room on the GPU."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        inputs = [name for name in names if is_input[name]]
        for name in inputs:
            shape = tuple(shapes.get(name, self._engine.get_tensor_shape(name)))
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"{path.name} does not take {name} as {shape}.", "Build it again.")
        generator = np.random.default_rng(0)
        buffers = []
        for name in names:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(extent < 0 for extent in shape):
                raise BackendError(f"The shape of '{name}' depends on the data: {shape}.", "Measure another model.")
            array = np.zeros(shape, trt.nptype(self._engine.get_tensor_dtype(name)))
            if is_input[name]:
                array = filled(array, generator)
            buffer = cuda.DeviceArray(shape=shape, dtype=array.dtype)
            buffer.copy_from(np.ascontiguousarray(array))
            self._context.set_tensor_address(name, buffer.ptr)
            buffers.append(buffer)
        return buffers


def filled(array: npt.NDArray[Any], generator: np.random.Generator) -> npt.NDArray[Any]:
    """Return an array like this one, of random numbers where it is of floats; indices stay 0, which is always one."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return generator.standard_normal(array.shape, dtype=np.float32).astype(array.dtype)
