"""Who computes outputs: the trained torch model, ONNX Runtime, and the arrays that they hand to one another.

Polygraphy's own PytRunner moves everything to a GPU and splits a lone output along its batch; so torch has a runner of
ours. torch is imported only when its runner runs.
"""

from __future__ import annotations

import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER

from slope_compile.qdq.tensors import load_graph
from slope_compile.verify.verdict import NotCheckedError

if TYPE_CHECKING:
    import onnxruntime as ort
    from onnx import GraphProto, ModelProto
    from torch import Tensor, nn

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]  # tensor name -> array, batch first
RANDOM_BATCH = 8  # samples, where nobody gave any
NO_ONNXRUNTIME = "onnxruntime is not installed"
FATAL = 4  # ONNX Runtime's severity below which it writes to stderr; what it has to say is in its exceptions


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Polygraphy from writing to stdout and stderr: stdout belongs to the command's own answer."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


def reference_session(onnx: Path) -> ort.InferenceSession:
    """Load a model without any graph optimization: what the file says is what is computed."""
    return load_session(str(onnx))


def default_session(onnx: Path) -> ort.InferenceSession:
    """Load a model with ONNX Runtime's default optimizations, as its users do."""
    return load_session(str(onnx), optimized=True)


def optimized_graph(onnx: Path) -> ModelProto:
    """Return what ONNX Runtime's default optimizations make of a model, as it saves it; its tensors are not read."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        load_session(str(onnx), optimized=True, saved=saved)
        return load_graph(saved)


def load_session(
    model: str | bytes, optimized: bool = False, folder: Path | None = None, saved: Path | None = None
) -> ort.InferenceSession:
    """Load a model into ONNX Runtime, on the CPU.

    Args:
        model: The file, or its bytes.
        optimized: With the default optimizations; otherwise without any.
        folder: Where the external data of a model given as bytes lies.
        saved: Where to write what is run, its tensors beside it.

    Raises:
        NotCheckedError: If ONNX Runtime is not here: a device needs none to run an engine.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        raise NotCheckedError(NO_ONNXRUNTIME) from None
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = FATAL
    # Idle threads sleep instead of spinning: torch and two sessions take turns on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if saved is not None:
        options.optimized_model_filepath = str(saved)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{saved.name}.data"
        )
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])


def input_names(session: ort.InferenceSession) -> list[str]:
    """Return the names of a session's inputs, in the order of the model's arguments."""
    return [value.name for value in session.get_inputs()]


def output_names(session: ort.InferenceSession) -> list[str]:
    """Return the names of a session's outputs, in the order in which the model returns them."""
    return [value.name for value in session.get_outputs()]


def interface(graph: GraphProto) -> tuple[list[str], list[str]]:
    """Return the names of a graph's inputs and outputs, as a session of it has them: an initializer is no input."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in constants], [v.name for v in graph.output]


def random_feed(session: ort.InferenceSession) -> Arrays:
    """Return standard-normal inputs of a session's shapes; a free first axis is the batch.

    Raises:
        NotCheckedError: If an input is no float32, has no axis, or another free one: nobody knows its length.
    """
    random = np.random.default_rng(0)
    feed = {}
    for value in session.get_inputs():
        known = bool(value.shape) and all(isinstance(length, int) for length in value.shape[1:])
        if value.type != "tensor(float)" or not known:
            what = f"input '{value.name}' is {value.type} {value.shape}"
            raise NotCheckedError(f"no golden samples were given, and none can be made up: {what}")
        first, *rest = value.shape
        shape = (first if isinstance(first, int) else RANDOM_BATCH, *rest)
        feed[value.name] = random.standard_normal(shape, dtype=np.float32)
    return feed


def samples_of(feed: Arrays) -> int:
    """Return how many samples a feed has: the length of the first axis; 1 without one."""
    return next((array.shape[0] for array in feed.values() if array.ndim), 1)


def infer(runner: BaseRunner, feeds: Sequence[Arrays]) -> list[Arrays]:
    """Run a Polygraphy runner over feeds and return its outputs, one mapping a feed."""
    with quiet(), np.errstate(all="ignore"):
        results = Comparator.run([runner], data_loader=[dict(feed) for feed in feeds])
    (_, iterations) = results[0]
    return [{name: np.asarray(value) for name, value in iteration.items()} for iteration in iterations]


def infer_onnx(session: ort.InferenceSession, feeds: Sequence[Arrays], name: str) -> list[Arrays]:
    """Run an ONNX Runtime session over feeds."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return infer(OnnxrtRunner(session, name=name), feeds)


class TorchRunner(BaseRunner):
    """Runs a torch model in evaluation mode, on the device where it is, and leaves it as it was.

    Args:
        model: Takes the inputs by position; returns a tensor, a sequence of tensors or a mapping of them. A detector of
            torchvision is run in the form that was exported.
        twin: The same model in ONNX Runtime: its inputs and outputs have the names, types and shapes.
    """

    def __init__(self, model: nn.Module, twin: ort.InferenceSession) -> None:
        from slope_compile.export.detection import graph_form

        super().__init__(name="torch")
        self._model = model
        self._inputs, self._outputs = twin.get_inputs(), output_names(twin)
        self._evaluated = ExitStack()
        # Made here, once: to measure its features it runs a detector's backbone, which is no sample's answer.
        self.activate_impl()
        try:
            self._form = graph_form(model, tuple(self._inputs[0].shape[1:])).eval()
        finally:
            self.deactivate_impl()

    def activate_impl(self) -> None:
        """Switch to evaluation."""
        self._evaluated.enter_context(evaluated(self._model))

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return names, types and shapes of the inputs; a torch model declares none itself."""
        metadata = TensorMetadata()
        for value in self._inputs:
            metadata.add(value.name, dtype=DataType.from_dtype(value.type, "onnxruntime"), shape=value.shape)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, Array]:
        """Run the model on one feed; sets `inference_time` (seconds), which the Comparator sums up."""
        import torch
        from torch.nn.utils import parametrize

        where = next(iter(self._model.parameters()), torch.empty(0)).device
        arguments = [torch.as_tensor(np.asarray(feed_dict[value.name])).to(where) for value in self._inputs]
        start = time.perf_counter()
        with torch.inference_mode(), parametrize.cached():
            answer = tensors_of(self._form(*arguments))
        self.inference_time = time.perf_counter() - start
        if len(answer) != len(self._outputs):
            raise ValueError(f"the torch model returns {len(answer)} tensors, the ONNX model {len(self._outputs)}")
        return OrderedDict(zip(self._outputs, (tensor.float().cpu().numpy() for tensor in answer), strict=True))

    def deactivate_impl(self) -> None:
        """Give the model its modes and its state back."""
        self._evaluated.close()


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; give each module its mode and its buffers back afterwards.

    A batch norm that stays in training mode moves its statistics with every call, and other modules replace buffers.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module, _ in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before)


def tensors_of(answer: Any) -> list[Tensor]:
    """Return the tensors of a model's answer, in the order in which torch.onnx names them."""
    if isinstance(answer, Mapping):
        answer = tuple(answer.values())
    if isinstance(answer, list | tuple):
        return [tensor for part in answer for tensor in tensors_of(part)]
    return [answer]
