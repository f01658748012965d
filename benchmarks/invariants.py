"""The laws of the weights on files of a billion weights: wall time and peak memory, beside reading the file whole.

    python -m benchmarks.invariants --out benchmarks/results/invariants.json

Each layout is written into a temporary folder (at most 3.5 GB at once), checked by a process of its own, and deleted.
`laws`: sha256 of the files, then `pattern` and `codes` as `verify` runs them. `whole`: `onnx.load`, `to_array` of every
initializer and one count over each array, which is how a sparsity inspection is usually written; it proves less (no
range, scales or codes). Peak memory is the process's largest resident set, interpreter and libraries included; `idle`
is that of a process that only imports. `seconds` are of the wall clock, `cpu_seconds` of the process; `load` tells
whether the machine was its own. Takes about twelve minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from slope_compile import machine
from slope_compile.artifacts import FileDigest, write_atomically
from slope_compile.codes_file import StoredCodes, save_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.qdq.reader import iter_weights
from slope_compile.verify.laws.check import Declared, check_codes, check_pattern
from slope_compile.verify.laws.files import Artifacts, examine_placed
from slope_compile.verify.verdict import Once

WEIGHTS = 1_000_000_000
Codes = npt.NDArray[np.int8]


class Layout(NamedTuple):
    """How a file keeps its weights.

    Attributes:
        dtype: ONNX's type of the stored numbers.
        op: Conv, MatMul (K, N) or Gemm with transB (N, K).
        layers: How many weights.
        external: In a file of their own.
    """

    dtype: str
    op: str
    layers: int
    external: bool


LAYOUTS = (
    Layout("INT4", "Conv", 300, external=True),
    Layout("INT4", "Conv", 300, external=False),
    Layout("INT4", "MatMul", 300, external=True),
    Layout("INT4", "MatMul", 1, external=False),
    Layout("INT4", "Gemm", 1, external=True),
    Layout("INT8", "Gemm", 300, external=True),
    Layout("INT8", "Conv", 1, external=True),
    Layout("INT2", "MatMul", 300, external=False),
    Layout("FLOAT16", "Gemm", 300, external=True),
)
BITS = {"INT2": 2, "INT4": 4, "INT8": 8}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the figures; or be one of the processes measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=WEIGHTS)
    parser.add_argument("--layouts", type=int, nargs="+", default=range(len(LAYOUTS)))
    parser.add_argument("--skip-whole", action="store_true", help="measure only the laws")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--measure", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(PROCESSES[options.measure], options.file)))
        return
    if options.out is None:
        parser.error("--out names the file to write")
    which = ["laws"] if options.skip_whole else ["laws", "whole"]
    document: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.invariants", *(sys.argv[1:] if arguments is None else arguments)]),
        "weights": options.weights,
        "idle_mb": child("idle", Path())["peak_mb"],
        "layouts": [],
        "versions": machine.versions(),
        "machine": {key: value for key, value in machine.machine().items() if key in ("cores", "memory_bytes", "gpus")},
    }
    for index in options.layouts:  # written each time: an interrupted measurement keeps what was measured
        document["layouts"].append(compared(LAYOUTS[index], options.weights, which))
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


def compared(layout: Layout, weights: int, which: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one layout."""
    with tempfile.TemporaryDirectory(prefix="invariants-") as folder:
        path = written(layout, weights, Path(folder))
        sizes = {file.name: file.stat().st_size for file in sorted(Path(folder).iterdir())}
        row: dict[str, Any] = {**layout._asdict(), "bytes": sizes, **{name: child(name, path) for name in which}}
        row["load"] = round(os.getloadavg()[0], 1)  # runnable processes while it was measured, this one included
    print(json.dumps(row), file=sys.stderr)
    return row


def child(which: str, path: Path) -> dict[str, Any]:
    """Run one of the processes and return what it measured."""
    command = [sys.executable, "-m", "benchmarks.invariants", "--measure", which, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(work: Callable[[Path], str], path: Path) -> dict[str, Any]:
    """Do the work in this process."""
    start, cpu = time.perf_counter(), time.process_time()
    said = work(path)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mb": round(machine.peak_memory() / 1e6),
        "said": said,
    }


def laws(path: Path) -> str:
    """Digest every file, and check `pattern` and `codes`; of floats the pattern, as of a file that a backend gets."""
    for file in sorted(path.parent.iterdir()):
        FileDigest.of(file)
    codes = path.with_name("codes.safetensors")
    if not codes.is_file():
        every = {f"layer{index}.weight": Declared(16, (2, 4)) for index in range(1000)}
        found = examine_placed(path, every)
        assert not found.findings, found.findings
        return f"laws hold: {found.figures}"
    expected = Once[Any](lambda: StoredCodes(codes))
    checks = [
        check_pattern(lambda: iter_weights(path), expected, None, Artifacts.of(path, None, codes)),
        check_codes(lambda: iter_weights(path), expected, None),
    ]
    assert all(check.status == "pass" for check in checks), checks
    return "; ".join(f"{check.name} {check.status}: {check.detail}" for check in checks)


def whole(path: Path) -> str:
    """Load the file with its tensors, and count each array's groups in one piece."""
    model = onnx.load(path)
    weights = groups = broken = 0
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.ndim < 2:
            continue
        if array.ndim == 2 and path.name.startswith("MatMul"):
            array = array.T
        counts = np.count_nonzero(np.moveaxis(array, 1, -1).reshape(-1, 4), axis=1)
        weights, groups, broken = weights + array.size, groups + counts.size, broken + int(np.sum(counts > 2))
    return f"{weights} weights, {broken} of {groups} groups broken"


PROCESSES: dict[str, Callable[[Path], str]] = {"laws": laws, "whole": whole, "idle": lambda _: "nothing"}


def written(layout: Layout, weights: int, folder: Path) -> Path:
    """Write a file of so many 2:4 weights, and the checkpoint's codes where it is coded."""
    rows, reduced, *kernel = shape = _shape(layout, weights)
    base = _codes(rows, reduced, tuple(kernel), BITS.get(layout.dtype, 8))
    codes = np.concatenate([base] * -(-rows // len(base)))[:rows]
    scale = np.linspace(0.01, 0.02, rows, dtype=np.float32)
    stored = codes.T if layout.op == "MatMul" else codes
    data = _bytes(stored, layout.dtype)
    path = folder / f"{layout.op}.onnx"
    nodes, tensors = [], []
    for index in range(layout.layers):
        more_nodes, more_tensors = _layer(layout, index, stored.shape, scale)
        nodes += more_nodes
        tensors += more_tensors
        big = tensors[-1]
        if layout.external:
            onnx.external_data_helper.set_external_data(
                _placeholder(big), "weights.data", offset=index * len(data), length=len(data)
            )
        else:
            big.raw_data = data
    if layout.external:
        with (folder / "weights.data").open("wb") as file:
            for _ in range(layout.layers):
                file.write(data)
    axes = {"Conv": 4}.get(layout.op, 2)
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None] * axes) for n in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    opset = 25 if layout.dtype == "INT2" else 21
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=13)
    path.write_bytes(model.SerializeToString())
    if layout.dtype in BITS:
        tensor = CodedTensor(codes.reshape(shape), scale, BITS[layout.dtype], 0, (2, 4))
        save_codes(folder / "codes.safetensors", {f"layer{index}.weight": tensor for index in range(layout.layers)})
    return path


def _shape(layout: Layout, weights: int) -> tuple[int, ...]:
    """Return a torch shape with about as many elements as one layer has; at least as many."""
    each = weights // layout.layers
    if layout.op == "Conv":
        channels = 256
        return -(-each // (channels * 9)), channels, 3, 3
    width = max(4, int(each**0.5) // 64 * 64)
    return -(-each // width), width


def _codes(rows: int, reduced: int, kernel: tuple[int, ...], bits: int) -> Codes:
    """Return 2:4 codes along axis 1 of some rows; they are repeated."""
    rng = np.random.default_rng(0)
    shape = (min(rows, 64), *kernel, reduced // 4, 4)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=np.int8)
    keep = np.argsort(rng.random(shape, dtype=np.float32), axis=-1) < 2
    found = (codes * keep).reshape(shape[0], *kernel, reduced)
    return np.ascontiguousarray(np.moveaxis(found, -1, 1))


def _bytes(stored: Codes, dtype: str) -> bytes:
    """Return numbers as ONNX stores them."""
    flat = np.ascontiguousarray(stored).ravel()
    if dtype == "FLOAT16":
        return flat.astype(np.float16).tobytes()
    each = 8 // BITS[dtype]
    codes = np.append(flat, np.zeros(-flat.size % each, np.int8)).view(np.uint8) & (2 ** BITS[dtype] - 1)
    packed = codes[::each].copy()
    for index in range(1, each):
        packed |= codes[index::each] << (BITS[dtype] * index)
    return bytes(packed.tobytes())


def _layer(layout: Layout, index: int, shape: tuple[int, ...], scale: Any) -> tuple[list[Any], list[Any]]:
    """Return the nodes and tensors of one layer; the big one last, without its numbers."""
    name, into, out = f"layer{index}.weight", f"h{index}" if index else "x", f"h{index + 1}"
    out = "y" if index + 1 == layout.layers else out
    attributes: dict[str, Any] = {"transB": 1} if layout.op == "Gemm" else {}
    multiply = onnx.helper.make_node(layout.op, [into, name], [out], name=f"{name}.op", **attributes)
    kind = getattr(onnx.TensorProto, layout.dtype)
    if layout.dtype not in BITS:
        return [multiply], [onnx.TensorProto(name=name, dims=shape, data_type=kind)]
    axis = 1 if layout.op == "MatMul" else 0
    inputs = [f"{name}.codes", f"{name}.scale"]
    dequantize = onnx.helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dq", axis=axis)
    big = onnx.TensorProto(name=inputs[0], dims=shape, data_type=kind)
    return [dequantize, multiply], [onnx.numpy_helper.from_array(scale, inputs[1]), big]


def _placeholder(tensor: onnx.TensorProto) -> onnx.TensorProto:
    tensor.raw_data = b""  # what the helper asks for
    return tensor


if __name__ == "__main__":
    main()
