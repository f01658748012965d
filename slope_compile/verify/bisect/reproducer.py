"""One layer as a model of its own, with its input and the reference's output, for `polygraphy run` to replay."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from slope_compile.artifacts import storage_errors
from slope_compile.qdq.tensors import to_numpy
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.parameters import parameters
from slope_compile.verify.bisect.points import Key, Side
from slope_compile.verify.bisect.search import Local, Points
from slope_compile.verify.bisect.torch_side import TorchSide
from slope_compile.verify.chain.runners import Arrays, quiet

FOLDER, MODEL, INPUTS, OUTPUTS, COMMAND = "reproducer", "model.onnx", "inputs.json", "outputs.json", "command.txt"
OPSET, IR_VERSION = 21, 10  # of a layer that torch computes
LEVELS = {True: "ORT_ENABLE_ALL", False: "ORT_DISABLE_ALL"}


@dataclass(frozen=True)
class Reproducer:
    """What was written.

    Args:
        folder: Relative to the verification's folder.
        command: Run in that folder: exit code 0 where the outputs agree, 1 where they do not.
    """

    folder: str
    command: str


def write_reproducer(
    out: Path, check: str, reference: Side, tested: OnnxSide, feed: Arrays, points: Points, found: Local
) -> Reproducer:
    """Write the part of a file that computes one tensor, what the reference gives it, and what it should make of that.

    Args:
        out: The verification's folder.
        check: The check that failed, the folder's name.
        reference: The side that is right.
        tested: The file.
        feed: The inputs with which the layer was found.
        points: What both sides have.
        found: The tensor that is not reproduced.

    Raises:
        StorageError: If the disk is full or read-only.
    """
    graph, place = tested.graph, tested.graph.keys[found.key]
    at = {graph.keys[key]: key for key in points.keys if graph.keys[key] != place}
    begins, _ = graph.segment(place, at.keys())
    keys = [at[name] for name in begins if name in at]
    known = reference.values(feed, keys)
    with np.errstate(over="ignore"):
        inputs = {name: tested.typed(name, known[at[name]] if name in at else feed[name]) for name in begins}
    model = standalone(tested, list(inputs), place)
    _declare(model, {name: array.shape for name, array in inputs.items()} | {place: found.reference.shape})
    expected = {place: tested.typed(place, found.reference)}
    return _write(out, check, model, inputs, expected, replay_command(tested.optimized, _absolute(found)))


def write_layer(
    out: Path, check: str, reference: Side, tested: TorchSide, feed: Arrays, found: Local
) -> Reproducer | None:
    """Write one convolution or linear layer of a torch model as ONNX, with the reference's input and output.

    Args:
        out: The verification's folder.
        check: The check that failed, the folder's name.
        reference: The side that is right.
        tested: The torch model.
        feed: The inputs with which the layer was found.
        found: What the layer returns.

    Returns:
        None for a layer of another kind.

    Raises:
        StorageError: If the disk is full or read-only.
    """
    held, op = parameters(tested, found.key.name), tested.onnx_operator(found.key.name)
    if held is None or held.weight is None or op is None:
        return None
    given = reference.values(feed, [key := Key(found.key.name, "input", found.key.call)])[key]
    weight = held.weight if op == "Conv" else np.ascontiguousarray(held.weight.T)
    tensors = [numpy_helper.from_array(weight, "weight")]
    attributes = held.attributes if op == "Conv" else {}
    nodes = [helper.make_node(op, ["input", "weight"], ["product"], name=found.key.name, **attributes)]
    if "bias" in held.others:
        bias = held.others["bias"]
        tensors.append(
            numpy_helper.from_array(bias.reshape(-1, *[1] * (given.ndim - 2)) if op == "Conv" else bias, "bias")
        )
        nodes.append(helper.make_node("Add", ["product", "bias"], ["output"]))
    else:
        nodes[0].output[0] = "output"
    begin = helper.make_tensor_value_info("input", TensorProto.FLOAT, given.shape)
    end = helper.make_tensor_value_info("output", TensorProto.FLOAT, found.reference.shape)
    graph = helper.make_graph(nodes, "layer", [begin], [end], tensors)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="slope-compile")
    command = replay_command(False, _absolute(found))
    return _write(out, check, model, {"input": given}, {"output": found.reference}, command)


def _write(out: Path, check: str, model: onnx.ModelProto, inputs: Arrays, expected: Arrays, command: str) -> Reproducer:
    folder = out / FOLDER / check
    with storage_errors(folder), quiet():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(model.SerializeToString())
        save_json([dict(inputs)], str(folder / INPUTS))
        results = RunResults()
        results.append(("reference", [IterationResult(dict(expected), runtime=0, runner_name="reference")]))
        results.save(str(folder / OUTPUTS))
        (folder / COMMAND).write_text(command + "\n", encoding="utf-8")
    return Reproducer(f"{FOLDER}/{check}", command)


def standalone(tested: OnnxSide, given: Sequence[str], wanted: str) -> onnx.ModelProto:
    """Return the part of a file that computes one value from others, with all its constants inside it."""
    graph = tested.graph
    model = graph.part(given, [wanted])
    model.producer_name = "slope-compile"
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            array = to_numpy(tensor, graph.path, tensor.name)
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(kind), tensor.name))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(wanted, graph.type_of(wanted), None))
    return model


def _declare(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give inputs and output the shapes that they are replayed with."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shapes[value.name]))


def clear_reproducers(out: Path, checks: Iterable[str]) -> None:
    """Remove what an earlier verification wrote for some checks: they may pass now. Other files are left.

    Args:
        out: The verification's folder.
        checks: Names of checks.

    Raises:
        StorageError: If the file system refuses.
    """
    folders = [folder for check in checks if (folder := out / FOLDER / check).is_dir() and not folder.is_symlink()]
    with storage_errors(out):
        for folder in folders:
            for name in (MODEL, INPUTS, OUTPUTS, COMMAND):
                (folder / name).unlink(missing_ok=True)
        for folder in [*folders, *([out / FOLDER] if folders else [])]:
            if not any(folder.iterdir()):
                folder.rmdir()


def replay_command(optimized: bool, atol: float) -> str:
    """Return the command that runs the part in ONNX Runtime and compares it with the reference's outputs.

    Args:
        optimized: With ONNX Runtime's default optimizations, or without any: Polygraphy's own default is with.
        atol: The largest |difference| that floats explain.
    """
    where = ["polygraphy", "run", MODEL, "--onnxrt", "--graph-optimization-level", LEVELS[optimized]]
    what = ["--load-inputs", INPUTS, "--load-outputs", OUTPUTS, "--atol", f"{atol:.6g}", "--rtol", "0"]
    return shlex.join([*where, *what])


def _absolute(found: Local) -> float:
    """Return what is allowed of each element; of integers, so much that each may be rounded the other way."""
    if found.key.role == "quantizer":
        return 1.0
    finite = found.reference[np.isfinite(found.reference)]
    return found.allowed * (float(np.max(np.abs(finite), initial=0.0)) or 1.0)
