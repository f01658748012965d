from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.numpy
import torch
from export_models import CONVNET_BITS, convnet, give_codes, relative_error, run_onnx

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.export.model import Files, export_model
from slope_compile.export.passes import run_pass
from slope_compile.export.passes.hold import HoldWeights
from slope_compile.export.passes.optimize import Optimize
from slope_compile.export.passes.quantize import QuantizeWeights
from slope_compile.export.passes.write import WriteModel
from slope_compile.qdq.reader import coded_weights


def test_the_files_codes_and_scales_are_the_trained_ones(exported: SimpleNamespace) -> None:
    proto = onnx.load(exported.files.model)
    tensors = {t.name: t for t in proto.graph.initializer}
    for name, coded in exported.codes.items():
        container = "INT8" if coded.bits > 4 else "INT4"
        assert onnx.TensorProto.DataType.Name(tensors[f"{name}.codes"].data_type) == container
        stored = onnx.numpy_helper.to_array(tensors[f"{name}.codes"]).astype(np.int8)
        assert np.array_equal(stored, coded.codes)
        scale = onnx.numpy_helper.to_array(tensors[f"{name}.scale"])
        assert np.array_equal(scale.ravel(), coded.scale)
        assert name not in tensors
        (node,) = (n for n in proto.graph.node if n.name == f"{name}.dq")
        assert (node.op_type, list(node.output)) == ("DequantizeLinear", [name])
    assert np.array_equal(onnx.numpy_helper.to_array(tensors["0.weight"]), exported.model[0].weight.detach().numpy())


def test_int4_bytes_hold_the_first_code_in_the_low_nibble(exported: SimpleNamespace) -> None:
    proto = onnx.load(exported.files.model)
    (codes,) = (t for t in proto.graph.initializer if t.name == "3.weight.codes")
    flat = exported.codes["3.weight"].codes.ravel().astype(int) & 0xF
    assert codes.raw_data == bytes(low | high << 4 for low, high in zip(flat[::2], flat[1::2], strict=True))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_any_batch_gives_the_trained_models_output(exported: SimpleNamespace, batch: int) -> None:
    x = torch.randn(batch, 3, 12, 12)
    with torch.no_grad():
        expected = exported.model(x).numpy()
    assert relative_error(run_onnx(exported.files.model, x), expected) < 1e-5


def test_golden_outputs_are_the_models(exported: SimpleNamespace) -> None:
    golden = safetensors.numpy.load_file(exported.files.golden)
    assert np.array_equal(golden["inputs"], exported.inputs.numpy())
    with torch.no_grad():
        assert np.array_equal(golden["outputs"], exported.model(exported.inputs).numpy())
    assert golden["outputs"].dtype == np.float32


def test_the_signature(exported: SimpleNamespace) -> None:
    proto = onnx.load(exported.files.model)
    (x,), (y,) = proto.graph.input, proto.graph.output
    assert [x.name, y.name] == ["input", "output"]
    dims = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (x, y)]
    assert dims == [["batch", 3, 12, 12], ["batch", 10]]
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert (proto.producer_name, proto.ir_version) == ("slope-compile", 10)


def test_batch_norms_stay_behind_coded_weights(exported: SimpleNamespace) -> None:
    ops = [node.op_type for node in onnx.load(exported.files.model).graph.node]
    assert ops.count("BatchNormalization") == 2
    assert set(ops) <= {
        "Conv",
        "BatchNormalization",
        "Relu",
        "DequantizeLinear",
        "ReduceMean",
        "Reshape",
        "Gemm",
        "Shape",
    }


def test_nothing_of_this_machine_is_in_the_file(exported: SimpleNamespace) -> None:
    content = exported.files.model.read_bytes()
    for word in (str(Path.cwd()), str(Path.home()), "site-packages", ".py", "stack_trace", "pkg.torch", "pytorch"):
        assert word.encode() not in content


def test_the_same_model_gives_the_same_bytes(exported: SimpleNamespace, tmp_path: Path) -> None:
    model = convnet()
    codes = give_codes(model, CONVNET_BITS)
    files = Files.inside(tmp_path)
    export_model(model, codes, exported.inputs, files, 21, Events())
    for again, before in zip(vars(files).values(), vars(exported.files).values(), strict=True):
        assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(before.read_bytes()).digest()


def test_layers_json_counts_what_is_in_the_file(exported: SimpleNamespace) -> None:
    assert json.loads(exported.files.layers.read_text()) == exported.layers
    rows = {row["name"]: row for row in exported.layers["layers"]}
    assert list(rows) == ["0.weight", "3.weight", "6.weight", "9.weight", "11.weight"]
    assert [row["placement"] for row in rows.values()] == [
        "float",
        "int4-storage",
        "int4-storage",
        "int4-weight",
        "int8-weight",
    ]
    assert [row["op"] for row in rows.values()] == ["Conv", "Conv", "Conv", "Gemm", "Gemm"]
    assert [row["bits"] for row in rows.values()] == [None, 4, 3, 4, 8]
    assert [row["pattern"] for row in rows.values()] == [None, "2:4", "2:4", "2:4", "2:4"]
    assert rows["3.weight"]["bytes"] == {"fp32": 4 * 16 * 8 * 9, "file": 16 * 8 * 9 // 2 + 4 * 16}
    assert rows["9.weight"]["bytes"] == {"fp32": 4 * 20 * 64, "file": 20 * 64 // 2 + 4 * 20}
    assert rows["11.weight"]["bytes"] == {"fp32": 4 * 10 * 20, "file": 10 * 20 + 4 * 10}
    assert rows["0.weight"]["bytes"] == {"fp32": 4 * 8 * 27, "file": 4 * 8 * 27}
    for name, coded in exported.codes.items():
        assert rows[name]["density"] == np.count_nonzero(coded.codes) / coded.codes.size <= 0.5
        assert rows[name]["shape"] == list(coded.codes.shape)
        assert rows[name]["reason"]


def test_the_model_is_left_as_it_was(exported: SimpleNamespace) -> None:
    fresh = convnet()
    give_codes(fresh, CONVNET_BITS)
    for name, value in fresh.state_dict().items():
        assert torch.equal(exported.model.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in exported.model.parameters())


def test_progress_is_told(exported: SimpleNamespace) -> None:
    told = [(event["done"], event["total"]) for event in exported.events]
    assert told == [(i, 4) for i in range(5)]


def test_codes_that_break_a_law_are_refused_before_any_work(exported: SimpleNamespace, tmp_path: Path) -> None:
    bad = CodedTensor(exported.codes["3.weight"].codes, -exported.codes["3.weight"].scale, 4, 0, (2, 4))
    with pytest.raises(ArtifactError, match=r"3\.weight"):
        export_model(exported.model, {"3.weight": bad}, exported.inputs, Files.inside(tmp_path), 21, Events())
    assert list(tmp_path.iterdir()) == []


def test_tensors_over_the_limit_go_beside_the_file(
    exported: SimpleNamespace, fresh_graph: Callable[[], ir.Model], tmp_path: Path
) -> None:
    graph = fresh_graph()
    hold = HoldWeights(exported.codes, ["0.weight", *exported.codes])
    run_pass(hold, graph)
    run_pass(Optimize(21), graph)
    quantize = QuantizeWeights(hold.held, exported.codes, 21)
    run_pass(quantize, graph)
    path = tmp_path / "model.onnx"
    run_pass(WriteModel(path, exported.codes, quantize.placements, external_over=1000), graph)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    codes = {weight.name: weight.codes for weight in coded_weights(path)}
    assert all(np.array_equal(codes[name], coded.codes) for name, coded in exported.codes.items())
    assert relative_error(run_onnx(path, exported.inputs), run_onnx(exported.files.model, exported.inputs)) < 1e-6


def test_two_bits_ride_in_int2_at_opset_25(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 64, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 6),
    )
    codes = give_codes(model, {"0.weight": 2, "4.weight": 2})
    files = Files.beside(tmp_path / "m.onnx")
    x = torch.randn(3, 4, 8, 8)
    layers = export_model(model, codes, x, files, 25, Events())["layers"]
    assert [(row["container"], row["placement"]) for row in layers] == [
        ("INT2", "int4-storage"),
        ("INT2", "int4-weight"),
    ]
    assert layers[0]["bytes"]["file"] == 64 * 4 * 9 // 4 + 4 * 64
    assert onnx.load(files.model).ir_version == 13
    with torch.no_grad():
        assert relative_error(run_onnx(files.model, x), model(x).numpy()) < 1e-5
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.golden.safetensors", "m.layers.json", "m.onnx"]
