from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slope_compile.build.worker import Built, Request, clean_reason, parse_error
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.options import Options

RTX = BACKENDS["tensorrt-rtx"]


def error(desc: str, node: str = "", op: str = "") -> Any:
    return SimpleNamespace(desc=lambda: desc, node_name=lambda: node, node_operator=lambda: op)


def test_reason_without_the_cuda_tail() -> None:
    """As TensorRT-RTX 1.7.1 says it on a machine without a GPU."""
    where = "at /_src/optimizer/api/layers/layersImpl.cpp:444"
    text = (
        "Invalid Node - c.weight.dq\n"
        "ITensor::getDimensions: Error Code 4: API Usage Error (The blocking dimension must be the last "
        f"In validateQuantizationHelper {where})\n"
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
        "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient))"
    )
    assert clean_reason(text) == (
        "ITensor::getDimensions: Error Code 4: API Usage Error (The blocking dimension must be the last)."
    )


def test_reason_keeps_a_sentence() -> None:
    assert clean_reason("Non-zero zero point is not supported. ") == "Non-zero zero point is not supported."
    assert clean_reason("[checkMacros.cpp::catchCudaError::250] (cudaError 35: x)") == ""


def test_parse_error_names_node_operator_and_reason() -> None:
    found = parse_error(RTX, [error("no plugin", "nz", "NonZero"), error("more", "b", "B")])
    assert (
        found.problem == "TensorRT-RTX cannot parse node 'nz' (NonZero) of the model: no plugin. (1 more in build.log)"
    )


def test_parse_error_of_an_initializer() -> None:
    found = parse_error(RTX, [error("Failed to import initializer: c.weight.codes")])
    assert "an initializer of the model: Failed to import initializer: c.weight.codes." in found.problem


def test_parse_error_without_errors() -> None:
    assert "does not say why" in parse_error(RTX, []).problem


@pytest.mark.parametrize("profile", [{}, {"x": ([1, 3], [2, 3], [4, 3])}])
def test_request_survives_the_pipe(profile: dict[str, Any]) -> None:
    request = Request("tensorrt-rtx", "/m.onnx", (8, 0), profile, True, Options(workspace=4096, strip=True, dla=1))
    assert "\n" not in request.to_json()
    read = Request.from_json(request.to_json().encode())
    assert (read.sm, read.options) == (request.sm, request.options)
    assert read.to_json() == request.to_json()


def test_an_answer_survives_the_pipe() -> None:
    made = Built(b"engine\n", b"\0cache", "10.3.0", '{"Layers": ["é"]}')
    head, _, body = made.to_answer().partition(b"\n")
    assert Built.from_answer(json.loads(head), body) == made
    with pytest.raises(RuntimeError, match="sent 3 bytes"):
        Built.from_answer(json.loads(head), b"cut")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_command_leaves_no_builder_behind() -> None:
    child = (
        "import time; from slope_compile.build.worker import _end_with_parent\n"
        "_end_with_parent(); print(flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        status = Path(f"/proc/{int(process.stdout.readline())}/stat")
        process.kill()
    for _ in range(1000):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        threading.Event().wait(0.01)
    raise AssertionError("the builder outlived its parent")


def test_the_process_that_builds_imports_little() -> None:
    """It runs on devices, and what it allocates before TensorRT is loaded moves addresses."""
    code = "import sys; import slope_compile.build.worker; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "torch", "yaml", "polygraphy", "tensorrt_rtx"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
