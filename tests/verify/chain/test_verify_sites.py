"""Golden samples name the quantizers of activations of their model, and what each layer reads: a file must agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import slope_compile as sc
from slope_compile.compression.api import compress
from slope_compile.errors import ArtifactError
from slope_compile.export.golden import MADE_WITH
from slope_compile.qdq.sites import Quantizer, Sites, site_problems, what_is_read
from slope_compile.verify.verdict import Check

Edit = Callable[[onnx.ModelProto], None]


class Shared(nn.Module):
    """Two convolutions read one quantized tensor; their sum is read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        answer: torch.Tensor = self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))
        return answer


def exported(folder: Path, **options: Any) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Shared()
    compress(model, **options)
    for _ in range(3 if options else 0):
        model(torch.randn(8, 3, 8, 8))
    sc.export(model.eval(), torch.randn(4, 3, 8, 8), folder / "m.onnx")
    return model, folder / "m.onnx"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    return exported(tmp_path_factory.mktemp("quantized"), activation_bits=8)


def edited(source: Path, folder: Path, edit: Edit, golden: Path | None = None) -> Path:
    model = onnx.load(source)
    edit(model)
    onnx.save(model, folder / "m.onnx")
    shutil.copy(golden or source.with_suffix(".golden.safetensors"), folder / "m.golden.safetensors")
    return folder / "m.onnx"


def as_it_is(model: onnx.ModelProto) -> None:
    pass


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(one for one in model.graph.node if one.name == name)


def one_reads_floats(model: onnx.ModelProto) -> None:
    """Of the two layers that share a quantizer one reads what it quantizes."""
    taken, source = node(model, "left.input.dq").output[0], node(model, "left.input.q").input[0]
    reader = next(one for one in model.graph.node if one.op_type == "Conv" and one.input[1] == "right.weight")
    assert reader.input[0] == taken
    reader.input[0] = source


def without(*names: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for name in names:
            taken, source = node(model, f"{name}.dq").output[0], node(model, f"{name}.q").input[0]
            for one in model.graph.node:
                one.input[:] = [source if value == taken else value for value in one.input]
            for kind in ("q", "dq"):
                model.graph.node.remove(node(model, f"{name}.{kind}"))

    return edit


def moved(model: onnx.ModelProto) -> None:
    """The quantizer of the sum's shortcut quantizes the other product."""
    product = next(one for one in model.graph.node if one.op_type == "Conv" and one.input[1] == "left.weight").output[0]
    node(model, "right.output.q").input[0] = product


def last_bit(model: onnx.ModelProto) -> None:
    step = next(tensor for tensor in model.graph.initializer if tensor.name == "left.input.scale")
    value = np.nextafter(numpy_helper.to_array(step), np.float32(9))
    step.CopyFrom(numpy_helper.from_array(value, step.name))


def parity(path: Path, model: nn.Module | None = None) -> Check:
    return sc.verify(path, model=model)["parity.onnx"]


ALL = ("stem.input", "left.input", "right.output", "head.input")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (one_reads_floats, "right.weight reads stem.weight, not left.input as when it was exported"),
        (without("left.input"), "left.input: 8 bits, read by left.weight, right.weight: m.onnx does not quantize"),
        (without(*ALL), "head.input: 8 bits, read by head.weight: m.onnx does not quantize there"),
        (moved, "right.output reads left.weight, not right.weight as when it was exported"),
        (last_bit, "left.input: step is 0."),
    ],
    ids=["one layer of two", "one gone", "all gone", "moved", "last bit of a step"],
)
def test_a_lone_file_that_quantizes_otherwise_than_its_samples_say_fails(
    quantized: tuple[nn.Module, Path], tmp_path: Path, edit: Edit, words: str
) -> None:
    found = parity(edited(quantized[1], tmp_path, edit))
    assert found.status == "fail" and words in found.detail, found.detail
    assert "m.onnx quantizes otherwise than the model of m.golden.safetensors" in found.detail


def test_with_the_model_the_layer_is_named_too(quantized: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = quantized
    found = parity(edited(path, tmp_path, one_reads_floats), model)
    assert found.status == "fail" and "right.weight reads stem.weight, not left.input" in found.detail


def test_samples_of_the_same_weights_without_quantizers_are_not_those_of_the_model_with_them(
    quantized: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, plain = exported(tmp_path)
    (tmp_path / "x").mkdir()
    golden = {path: path.with_suffix(".golden.safetensors") for path in (plain, quantized[1])}
    found = parity(edited(quantized[1], tmp_path / "x", as_it_is, golden[plain]))
    assert found.status == "fail" and "left.input: m.onnx quantizes there, the model that was" in found.detail
    found = parity(edited(plain, tmp_path / "x", as_it_is, golden[quantized[1]]))
    assert found.status == "fail" and "left.input: 8 bits, read by left.weight" in found.detail
    assert parity(plain).status == "pass"


def identity_behind(model: onnx.ModelProto) -> None:
    for name in ("left.input.dq", "right.output.dq", "node_relu"):
        one = node(model, name)
        value, place = one.output[0], list(model.graph.node).index(one)
        one.output[0] = f"{value}.before"
        model.graph.node.insert(place + 1, helper.make_node("Identity", [one.output[0]], [value]))


def twice_dequantized(model: onnx.ModelProto) -> None:
    """Each of the two layers has a DequantizeLinear of its own, as ONNX Runtime's optimizer writes it."""
    one = node(model, "left.input.dq")
    reader = next(other for other in model.graph.node if other.op_type == "Conv" and other.input[1] == "right.weight")
    again = helper.make_node("DequantizeLinear", list(one.input), ["again"], "again")
    model.graph.node.insert(list(model.graph.node).index(reader), again)
    reader.input[0] = "again"


def quantized_again(*between: tuple[str, dict[str, Any]]) -> Edit:
    """Operators and the same pair once more behind a quantizer, as ONNX Runtime leaves two around a MaxPool."""

    def edit(model: onnx.ModelProto) -> None:
        pair = [node(model, f"left.input.{kind}") for kind in ("q", "dq")]
        value, place = pair[1].output[0], list(model.graph.node).index(pair[1]) + 1
        pair[1].output[0] = "once"
        made = [helper.make_node(op, [f"v{i}"], [f"v{i + 1}"], **more) for i, (op, more) in enumerate(between)]
        made += [helper.make_node(one.op_type, [f"v{len(between) + i}", *one.input[1:]], [f"v{len(between) + i + 1}"])
                 for i, one in enumerate(pair)]  # fmt: skip
        made[0].input[0], made[-1].output[0] = "once", value
        for one in reversed(made):
            model.graph.node.insert(place, one)

    return edit


POOL = ("MaxPool", {"kernel_shape": [1, 1]})
TURN = ("Transpose", {"perm": [0, 2, 3, 1]}), ("Transpose", {"perm": [0, 3, 1, 2]})


def in_reverse(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize("edit", [as_it_is, identity_behind, twice_dequantized, quantized_again(POOL, *TURN)])
def test_the_same_quantizers_written_otherwise_pass(
    quantized: tuple[nn.Module, Path], tmp_path: Path, edit: Edit
) -> None:
    found = parity(edited(quantized[1], tmp_path, edit))
    assert found.status == "pass" and "golden_not_told" not in found.figures, found.detail


@pytest.mark.parametrize(
    "between", [("AveragePool", {"kernel_shape": [1, 1]}), ("Neg", {})], ids=["AveragePool", "Neg"]
)
def test_a_pair_behind_what_makes_other_values_counts(
    quantized: tuple[nn.Module, Path], tmp_path: Path, between: tuple[str, dict[str, Any]]
) -> None:
    found = parity(edited(quantized[1], tmp_path, quantized_again(between)))
    assert found.status == "fail"
    assert "left.input: quantizes 2 tensors, 1 when it was exported" in found.detail


def test_a_pair_that_changes_no_number_is_held_against_the_model_too(
    quantized: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, path = quantized
    found = parity(edited(path, tmp_path, quantized_again(POOL, *TURN)), model)
    assert found.status == "pass", found.detail


def test_what_is_read_does_not_depend_on_the_order_of_the_nodes(quantized: tuple[nn.Module, Path]) -> None:
    model = onnx.load(quantized[1])
    reads = dict(what_is_read(model))
    assert reads["head.input"] == ("left.weight", "right.output") and reads["stem.input"] == ("",)
    assert reads[""] == ("head.weight",)
    in_reverse(model)
    assert what_is_read(model) == reads


def test_a_graph_that_depends_on_itself_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    with pytest.raises(ArtifactError, match="depends on itself"):
        what_is_read(helper.make_model(helper.make_graph(nodes, "g", [], [])))


ONE = Quantizer("3f800000", 4, -8, 7, 1)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ([], "activations"),
        ({"quantizers": {}}, "quantizers are told by"),
        ({"quantizers": [], "reads": {}}, "no attribute 'items'"),
        ({"quantizers": {"a": {"step": "3f8"}}, "reads": {}}, "missing 4 required"),
        ({"quantizers": {"a": {**vars(ONE), "step": "3f80"}}, "reads": {}}, "no float32"),
        ({"quantizers": {"a": {**vars(ONE), "step": 1}}, "reads": {}}, "no float32"),
        ({"quantizers": {"a": {**vars(ONE), "bits": 10**9}}, "reads": {}}, "of 1000000000 bits"),
        ({"quantizers": {"a": {**vars(ONE), "low": 0}}, "reads": {}}, "4 bits have no levels 0 to 7"),
        ({"quantizers": {"a": {**vars(ONE), "pairs": True}}, "reads": {}}, "are no integers"),
        ({"quantizers": {"a": {**vars(ONE), "pairs": 0}}, "reads": {}}, "0 tensors"),
        ({"quantizers": {}, "reads": {"a": 1}}, "not iterable"),
    ],
)
def test_a_header_that_is_none_of_ours_fails(
    quantized: tuple[nn.Module, Path], tmp_path: Path, header: Any, problem: str
) -> None:
    path = edited(quantized[1], tmp_path, as_it_is)
    golden = path.with_suffix(".golden.safetensors")
    with safe_open(golden, "numpy") as file:
        assert list(file.metadata()) == [MADE_WITH]  # of several the order would be another one each time
        made_with = json.loads(file.metadata()[MADE_WITH])
    told = {**made_with, "activations": header} if header else header
    save_file(load_file(golden), golden, metadata={MADE_WITH: json.dumps(told)})
    found = parity(path)
    assert found.status == "fail" and "m.golden.safetensors is no safetensors file" in found.detail
    assert problem in found.detail or not header


def test_a_missing_quantizer_is_told_once_and_not_of_all_who_read_it(
    quantized: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    """What read it reads what it read: that follows."""
    with safe_open(quantized[1].with_suffix(".golden.safetensors"), "numpy") as file:
        sites = Sites.from_json(json.loads(file.metadata()[MADE_WITH])["activations"])
    path = edited(quantized[1], tmp_path, without("left.input"))
    assert [told.partition(":")[0] for told in site_problems(sites, path)] == ["left.input"]
    kept = {name: one for name, one in sites.quantizers.items() if name != "left.input"}
    more = Sites(kept, what_is_read(onnx.load(path)))
    told = [one.partition(":")[0] for one in site_problems(more, quantized[1])]
    assert told == ["left.input"]
