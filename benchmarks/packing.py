"""The packed file beside other ways to store the same codes: bytes, bits a weight, time and memory.

    python -m benchmarks.packing --run runs/digits-resnet18 --out benchmarks/results/packing.json

Subjects: the run that is named, and codes in the shapes of ResNet-18 made of normal latents at 2, 3 and 4 bits (2:4,
first and last layer dense at 8 bits, the step of LSQ's initialization). What is compared, for the same coded weights:

| row | bytes of |
|---|---|
| `fp32` | 4 a weight |
| `nominal` | bits × n/m, no positions, no scales: no file can be read with so few |
| `indices` | bits × n/m, and 2 bits for each place that is kept, as sparse tensor cores take it (2:4: 1 bit a weight) |
| `entropy` | order-0 entropy of the masks of the groups and of the values that are not zero (dense: of the codes) |
| `packed` | the coded tensors' sections in the packed file, codes and scales |
| `onnx`, `onnx_zstd`, `onnx_packed` | files: INT4 ONNX, zstd level 19 of it, packed |
| `model_packed` | file: the packed run, norms and biases included |

`pack` and `unpack` run in processes of their own: wall and CPU seconds, largest resident set with interpreter and
libraries; `idle` is that of a process that only imports. `coders`: the same runs of bytes, by other coders and levels.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import zstandard
from safetensors.numpy import save_file

from slope_compile import machine
from slope_compile.artifacts import write_atomically
from slope_compile.codes_file import StoredCodes, save_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.pack.container import Container
from slope_compile.pack.groups import words_of
from slope_compile.pack.header import streams_of
from slope_compile.pack.read import Packed, open_packed
from slope_compile.pack.write import pack_onnx, pack_run

LEVELS = (1, 2, 3, 6, 9, 12, 15, 19, 22)
CODERS: dict[str, Callable[[bytes], bytes]] = {
    **{f"zstd {level}": zstandard.ZstdCompressor(level=level).compress for level in LEVELS},
    "zlib 9, Huffman only": lambda run: _huffman(run),
    "zlib 9": lambda run: zlib.compress(run, 9),
    "bz2": bz2.compress,
    "lzma": lzma.compress,
}
NAIVE_LEVEL = 19
_BLOCKS = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))  # in, out, stride


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the figures; or be one of the processes measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder that is trained and exported")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4], help="of the made codes")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--measure", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(lambda: PROCESSES[options.measure](*options.files))))
        return
    if options.out is None:
        parser.error("--out names the file to write")
    document: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.packing", *(sys.argv[1:] if arguments is None else arguments)]),
        "idle_mb": child("idle")["peak_mb"],
        "subjects": {},
        "versions": {**machine.versions(), "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))},
        "machine": {key: value for key, value in machine.machine().items() if key in ("cores", "memory_bytes", "gpus")},
    }
    with tempfile.TemporaryDirectory(prefix="packing-") as work:
        folder = Path(work)
        if options.run is not None:
            found = subject(options.run / "train", options.run / "export" / "model.onnx", folder / "run")
            document["subjects"][options.run.name] = found
        for bits in options.bits:
            train, exported = made(bits, folder / f"made{bits}")
            document["subjects"][f"resnet18, normal latents, {bits} bits"] = subject(
                train, exported, folder / f"{bits}"
            )
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")


def subject(train: Path, exported: Path, work: Path) -> dict[str, Any]:
    """Return the figures of one set of codes."""
    work.mkdir(parents=True)
    model, packed = work / "m.slope", work / "o.slope"
    found: dict[str, Any] = {
        "pack": child("pack-model", train, model),
        "unpack": child("unpack", model, work / "unpacked"),
        "pack_onnx": child("pack-onnx", exported, packed),
        "unpack_onnx": child("unpack", packed, work / "restored"),
        "load": round(os.getloadavg()[0], 1),  # runnable processes while it was measured, this one included
    }
    data = exported.read_bytes()
    naive = measured(lambda: zstandard.ZstdCompressor(level=NAIVE_LEVEL).compress(data))
    coded = compared(StoredCodes(train / "codes.safetensors"), open_packed(model))
    naive.pop("peak_mb")  # of this process, which did more than that
    files = {
        "onnx": len(data),
        "onnx_zstd": naive.pop("made"),
        "onnx_packed": packed.stat().st_size,
        "model_packed": model.stat().st_size,
    }
    found |= {"coded": coded, "files": files, "zstd_of_onnx": naive, "coders": coders(model)}
    print(json.dumps(found), file=sys.stderr)
    return found


def compared(codes: StoredCodes, packed: Packed) -> dict[str, Any]:
    """Return bytes of every way to store the coded tensors, of all and of those with a pattern alone."""
    rows = {row.name: row for row in packed.sizes.tensors}
    totals: dict[str, dict[str, float]] = {"all": {}, "2:4": {}}
    for name, coded in codes.items():
        share = 1.0 if coded.pattern is None else coded.pattern[0] / coded.pattern[1]
        places = 0.0 if coded.pattern is None else 2 * share
        ways = {
            "weights": coded.codes.size,
            "fp32": 4 * coded.codes.size,
            "onnx": 4 * coded.codes.size / 8 if coded.bits <= 4 else coded.codes.size,
            "nominal": coded.codes.size * coded.bits * share / 8,
            "indices": coded.codes.size * (coded.bits * share + places) / 8,
            "entropy": entropy(coded),
            "packed": rows[name].packed,
        }
        for group in ["all"] if coded.pattern is None else ["all", "2:4"]:
            totals[group] = {way: totals[group].get(way, 0) + value for way, value in ways.items()}
    return {group: _with_bits(ways) for group, ways in totals.items() if ways}


def _with_bits(ways: dict[str, float]) -> dict[str, Any]:
    bits = {way: round(8 * value / ways["weights"], 4) for way, value in ways.items() if way != "weights"}
    return {"bytes": {way: math.ceil(value) for way, value in ways.items()}, "bits_a_weight": bits}


def entropy(coded: CodedTensor) -> float:
    """Return the bytes that an ideal coder without context needs: for masks and values, or for dense codes."""
    if coded.pattern is None:
        return _entropy(coded.codes.reshape(-1).view(np.uint8))
    flat = np.ascontiguousarray(np.moveaxis(coded.codes, 1, -1)).reshape(-1)
    taken = flat != 0
    return _entropy(words_of(taken, coded.pattern[1])) + _entropy(flat[taken].view(np.uint8))


def _entropy(symbols: npt.NDArray[Any]) -> float:
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / max(1, symbols.size)
    return float(-(shares * np.log2(shares)).sum() * symbols.size / 8)


def coders(model: Path) -> dict[str, Any]:
    """Return, for each coder, the bytes of all coded tensors' runs and the CPU seconds that they take."""
    container = Container(model)
    runs = [run for entry in container.header.coded for run in container.read(entry.section, streams_of(entry))]
    raw = [run.tobytes() for run in runs]
    found = {}
    for name, coder in CODERS.items():
        start = time.process_time()
        size = sum(min(len(coder(run)), len(run)) for run in raw if run)
        found[name] = {"bytes": size, "cpu_seconds": round(time.process_time() - start, 2)}
    return found


def _huffman(run: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(run) + coder.flush()


def made(bits: int, folder: Path) -> tuple[Path, Path]:
    """Write codes in the shapes of ResNet-18: a train folder and an ONNX file; return both."""
    rng = np.random.default_rng(0)
    codes: dict[str, CodedTensor] = {}
    latents: dict[str, npt.NDArray[Any]] = {}
    for name, shape in shapes():
        dense = name in ("conv1.weight", "fc.weight")
        codes[name], latents[f"{name.removesuffix('weight')}parametrizations.weight.0.step"] = coded_of(
            rng.normal(0, 1, shape).astype(np.float32), 8 if dense else bits, None if dense else (2, 4)
        )
        latents[f"{name.removesuffix('weight')}parametrizations.weight.original"] = np.zeros(shape, np.float32)
    train = folder / "train"
    train.mkdir(parents=True)
    save_codes(train / "codes.safetensors", codes)
    save_file(latents, train / "checkpoint.safetensors")
    return train, _onnx_of(codes, folder / "model.onnx")


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of ResNet-18's weights, 1000 classes."""
    yield "conv1.weight", (64, 3, 7, 7)
    for stage, (into, out, stride) in enumerate(_BLOCKS, 1):
        for block in range(2):
            first = into if block == 0 else out
            yield f"layer{stage}.{block}.conv1.weight", (out, first, 3, 3)
            yield f"layer{stage}.{block}.conv2.weight", (out, out, 3, 3)
            if block == 0 and stride == 2:
                yield f"layer{stage}.0.downsample.0.weight", (out, into, 1, 1)
    yield "fc.weight", (1000, 512)


def coded_of(
    weight: npt.NDArray[np.float32], bits: int, pattern: tuple[int, int] | None
) -> tuple[CodedTensor, npt.NDArray[np.float32]]:
    """Return codes of a latent with LSQ's initial step 2<|w|>/sqrt(Qp), and that step."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = np.float32(2 * np.abs(weight).mean() / math.sqrt(high))
    if pattern is not None:
        groups = np.moveaxis(weight, 1, -1).reshape(-1, pattern[1])
        smallest = np.argsort(np.abs(groups), axis=1)[:, : pattern[1] - pattern[0]]
        np.put_along_axis(groups, smallest, 0, axis=1)
        turned = np.moveaxis(weight, 1, -1).shape
        weight = np.moveaxis(groups.reshape(turned), -1, 1)
    codes = np.ascontiguousarray(np.clip(np.round(weight / step), low, high).astype(np.int8))
    return CodedTensor(codes, np.full(len(codes), step), bits, 0, pattern), np.array(step)


def _onnx_of(codes: dict[str, CodedTensor], path: Path) -> Path:
    """Write codes as INT4 or INT8 initializers behind DequantizeLinear."""
    nodes, tensors = [], []
    for name, coded in codes.items():
        kind = ml_dtypes.int4 if coded.bits <= 4 else np.int8
        tensors.append(onnx.numpy_helper.from_array(coded.codes.astype(kind), f"{name}.codes"))
        tensors.append(onnx.numpy_helper.from_array(coded.scale, f"{name}.scale"))
        inputs = [f"{name}.codes", f"{name}.scale"]
        nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dq", axis=0))
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in codes]
    graph = onnx.helper.make_graph(nodes, "codes", [], outputs, tensors)
    imports = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def child(which: str, *files: Path) -> dict[str, Any]:
    """Run one of the processes and return what it measured."""
    command = [sys.executable, "-m", "benchmarks.packing", "--measure", which, "--files", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Do the work in this process; `made` is how many bytes it returned, if any."""
    start, cpu = time.perf_counter(), time.process_time()
    made = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = {"made": len(made)} if isinstance(made, bytes) else {}
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(machine.peak_memory() / 1e6),
        **size,
    }


PROCESSES: dict[str, Callable[..., Any]] = {
    "pack-model": pack_run,
    "pack-onnx": pack_onnx,
    "unpack": lambda path, folder: open_packed(path).restore(folder),
    "idle": lambda: None,
}

if __name__ == "__main__":
    main()
