"""`inspect --target`: planned placements and violations, as people and as programs read them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper
from qdq_graphs import node, sparse_codes, tensor

Inspect = Callable[..., Any]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Runs `slope-compile inspect` in this process."""
    from slope_compile_cli.main import main

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["slope-compile", "inspect", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return SimpleNamespace(code=code, out=told.out, err=told.err)

    return run


def save(path: Path, layers: list[tuple[Any, Any, str]]) -> Path:
    """A file of convolutions one behind the other, each of codes, scales per filter and a type."""
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []
    for i, (codes, scale, dtype) in enumerate(layers):
        tensors += [tensor(f"w{i}.codes", codes, dtype), tensor(f"w{i}.scale", scale, "FLOAT")]
        nodes.append(node("DequantizeLinear", [f"w{i}.codes", f"w{i}.scale"], f"w{i}", axis=0))
        nodes.append(node("Conv", [f"v{i}", f"w{i}"], f"v{i + 1}"))
    x = helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["batch", layers[0][0].shape[1], 8, 8])
    y = helper.make_tensor_value_info(f"v{len(layers)}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def one(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with one 2:4 convolution, INT4 codes and the given scale."""
    codes = sparse_codes(np.random.default_rng(0), (16, 8, 3, 3), 4, 1)
    return lambda scale=0.5: save(tmp_path / "m.onnx", [(codes, np.full(16, scale), "INT4")])


def test_without_a_target_it_lists_the_weights_only(inspect: Inspect, one: Any) -> None:
    told = json.loads(inspect(one(), "--json").out)
    assert set(told) == {"file", "bytes", "weights"}
    assert told["weights"][0] | {"density": 0} == {
        "name": "w0", "op": "Conv", "dtype": "INT4", "shape": [16, 8, 3, 3], "density": 0, "fits_2_4": True,
    }  # fmt: skip
    assert inspect(one(scale=0.0)).code == 0


def test_a_file_that_can_be_built(inspect: Inspect, one: Any) -> None:
    done = inspect(one(), "--target", "a100", "--json")
    told = json.loads(done.out)
    assert done.code == 0
    assert set(told) == {"file", "bytes", "target", "backend", "precision", "weights", "placement", "violations"}
    assert (told["target"], told["backend"]["name"], told["precision"]["name"]) == ("a100", "tensorrt", "fp16")
    (place,) = told["placement"]
    assert (place["name"], place["stored"]) == ("w0", "INT4")
    assert place["placement"] in place["costs"]
    assert place["container"] != "INT4"
    assert place["reason"]
    (violation,) = told["violations"]
    assert (violation["rule"], violation["level"], violation["where"]) == ("int4-conv", "warning", "Conv:v1")
    assert "slope-compile build" in violation["remedy"]


def test_the_backend_decides(inspect: Inspect, one: Any) -> None:
    told = json.loads(inspect(one(), "--target", "a100", "--backend", "tensorrt-rtx", "--json").out)
    assert told["placement"][0]["placement"] == "int4-storage"
    assert told["violations"] == []
    assert "no rule is broken" in inspect(one(), "--target", "a100", "--backend", "tensorrt-rtx").out


def test_an_error_exits_1_and_is_named_with_rule_and_source(inspect: Inspect, one: Any) -> None:
    done = inspect(one(scale=0.0), "--target", "a100")
    assert done.code == 1
    row = next(line for line in done.out.splitlines() if "scale-positive" in line)
    assert re.search(r"scale-positive .*error .*DequantizeLinear:w0 .*16 of 16 scales .*NvInfer\.h", row)
    assert "scale-positive: Quantize again" in done.out
    assert "1 errors, 1 warnings" in done.out
    done = inspect(one(scale=0.0), "--target", "a100", "--json")
    assert (done.code, json.loads(done.out)["violations"][0]["level"]) == (1, "error")


def test_a_weight_that_cannot_be_read_is_a_violation(inspect: Inspect, one: Any) -> None:
    path = one()
    model = onnx.load(path)
    model.graph.initializer[1].CopyFrom(tensor("w0.scale", np.ones(3), "FLOAT"))
    onnx.save(model, path)
    done = inspect(path, "--target", "a100")
    assert done.code == 1
    assert "no placement: Tensor 'w0'" in done.out
    assert "scale-shape" in done.out
    told = json.loads(inspect(path, "--target", "a100", "--json").out)
    assert told["placement"] == told["weights"] == []


def test_many_places_of_one_rule_are_counted(inspect: Inspect, tmp_path: Path) -> None:
    layer = (np.ones((8, 8, 1, 1)), np.full(8, -1.0), "INT8")
    done = inspect(save(tmp_path / "m.onnx", [layer] * 12), "--target", "a100")
    assert "… and 4 more" in done.out
    assert "12 errors, 0 warnings" in done.out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--target", "a10O"], "Did you mean 'a100'"),
        (["--target", "a100", "--backend", "tensort"], "Did you mean 'tensorrt'"),
        (["--backend", "tensorrt"], "Name the --target too"),
        (["--target", "orin", "--backend", "tensorrt-rtx"], "TensorRT-RTX"),
    ],
)
def test_what_is_no_question(inspect: Inspect, one: Any, arguments: list[str], problem: str) -> None:
    done = inspect(one(), *arguments)
    assert (done.code, problem in done.err) == (2, True), done.err


def test_unreadable_input(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07 not a model")
    (tmp_path / "c.safetensors").write_bytes(b"")
    for name in ("m.onnx", "gone.onnx", "c.safetensors"):
        assert inspect(tmp_path / name, "--target", "a100").code == 2


@pytest.mark.e2e
def test_a_run(inspect: Inspect, finished: Path, tmp_path: Path) -> None:
    run = finished / "runs" / "tiny"
    plain = json.loads(inspect(run, "--json").out)
    done = inspect(run, "--target", "a100", "--json")
    told = json.loads(done.out)
    assert done.code == 0
    assert {key: told[key] for key in plain} == plain
    assert [row["name"] for row in told["placement"]] == [f"{i}.weight" for i in (0, 3, 6, 11, 13, 15)]
    assert all(violation["level"] == "warning" for violation in told["violations"])
    early = tmp_path / "early"
    early.mkdir()
    (early / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (early / "manifest.json").write_text('{"version": 1, "stages": {}}')
    assert inspect(early, "--target", "a100").code == 2
