"""What real engines hold, against an independent reading of their raw logs: every INT4 and INT8 constant counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_nets import coded, save
from torch import Tensor, nn

import slope_compile as sc
from slope_compile.build import process
from slope_compile.build.engine import build_engine
from slope_compile.events import Events
from slope_compile.recipe import BatchRange, BuildSection


class Residual(nn.Module):
    """A ResNet's stem, one block with a downsample, its head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.second(self.first(x)) + self.down(x))
        return self.fc(x.mean((2, 3)))


class Transformer(nn.Module):
    """A DeiT's patches, one block, its head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        self.norm, self.qkv, self.proj = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return self.head((x + self.mlp(x)).mean(1))


MODELS = {"residual": Residual, "transformer": Transformer}


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MOST_BUILDS", 1)  # bytes that repeat are another test's business


@pytest.fixture(scope="module", params=[(name, bits) for name in MODELS for bits in (None, 8)], ids=str)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int | None, Path]:
    name, bits = request.param
    torch.manual_seed(0)
    model, images = MODELS[name](), torch.randn(4, 3, 8, 8)
    sc.compress(model, bits=4, pattern="2:4", activation_bits=bits)
    model(images)  # a training step sees ranges of activations
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    sc.export(model.eval(), images[:1], path)
    return name, bits, path


def build(model: Path, out: Path, **keys: Any) -> dict[str, Any]:
    section = BuildSection(backend="tensorrt-rtx", batch=BatchRange(min=1, opt=2, max=4), **keys)
    return build_engine(model, "a100", section, out, Events())


def raw_constants(log: Path) -> Counter[tuple[str, int]]:
    """(type, elements) of every constant in the log's layer list: cut at brackets, no pattern of ours."""
    found: Counter[tuple[str, int]] = Counter()
    text = log.read_text(errors="replace").rpartition("Layers:\n")[2]
    for line in text[: text.index("\n\n")].splitlines():
        listed = line.partition("Constants: [")[2].partition("], Outputs: [")[0]
        for one in listed.split("{ Name: ")[1:]:
            extents = one.partition("Dimensions: [")[2].partition("]")[0].split(",")
            dtype = one.partition("Datatype: ")[2].partition(",")[0]
            found[dtype, int(np.prod([int(extent) for extent in extents if extent]))] += 1
    return found


def compare_with_log(result: dict[str, Any], out: Path) -> None:
    rows = [row["engine"] for row in result["layers"]]
    raw = raw_constants(out / "build.log")
    bits = {"Int4": 4, "Int8": 8}
    claimed = Counter((one["dtype"], one["bytes"] * 8 // bits[one["dtype"]]) for one in rows if one["dtype"] in bits)
    assert claimed == Counter({key: count for key, count in raw.items() if key[0] in bits})
    for one in rows:
        assert one["computed_by"], one


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_integer_constant_is_some_weight_s(
    export: tuple[str, int | None, Path], precision: Any, tmp_path: Path
) -> None:
    _, bits, model = export
    result = build(model, tmp_path, precision=precision)
    rows, summary = result["layers"], result["summary"]
    compare_with_log(result, tmp_path)
    assert summary["held"] == summary["coded"] == len(rows)
    assert summary["sparse"]["fits_2_4"] == sum(row["pattern"] == "2:4" for row in rows) > 0
    assert summary["read_from"] == "build log"
    if bits:
        assert summary["int8"] == {"declared": len(rows), "multiplied": len(rows)}
        assert summary["sparse"]["possible"] == summary["sparse"]["fits_2_4"]
        assert all(row["engine"]["fused"] for row in rows)
    else:
        assert summary["int8"]["multiplied"] == summary["sparse"]["possible"] == 0
        fused = {row["op"] for row in rows if row["engine"]["fused"]}
        assert fused and "Conv" not in fused  # TensorRT-RTX dequantizes for a convolution apart
    assert f"float left in {summary['float']}" in summary["line"]
    assert summary["float"] == 0


def test_weights_placed_in_float(export: tuple[str, int | None, Path], tmp_path: Path) -> None:
    _, bits, model = export
    if bits:
        return  # an operator with an INT8 activation multiplies INT8
    result = build(model, tmp_path, precision="fp16", placement={"*": "float"})
    rows = result["layers"]
    assert [row["engine"]["dtype"] for row in rows] == ["Half"] * len(rows)
    assert not any(key[0] in ("Int4", "Int8") for key in raw_constants(tmp_path / "build.log"))
    assert (result["summary"]["float"], result["summary"]["coded"]) == (len(rows), 0)


def projections(path: Path, channels: int, block: int) -> Path:
    """Three MatMuls that read one input, as queries, keys and values do."""
    tensors, nodes = [], []
    for name in "qkv":
        codes = np.random.default_rng(0).integers(-7, 8, (channels, 64))
        scale = np.full((-(-channels // block), 64), 0.5)
        made, node = coded(f"{name}.weight", codes, scale, "INT4", axis=0, block_size=block)
        tensors += made
        nodes += [node, helper.make_node("MatMul", ["x", f"{name}.weight"], [name], name=f"{name}.fc")]
    nodes.append(helper.make_node("Concat", ["q", "k", "v"], ["y"], name="cat", axis=1))
    return save(path / "model.onnx", nodes, tensors, ["batch", channels], "y")


@pytest.mark.parametrize("channels", [256, 200])
def test_blocks_and_a_short_last_block(tmp_path: Path, channels: int) -> None:
    result = build(projections(tmp_path, channels, 128), tmp_path, precision="fp16", placement={"*": "int4-weight"})
    compare_with_log(result, tmp_path)
    summary = result["summary"]
    assert (summary["int4"], summary["held"]) == ({"held": 3, "fused": 3}, 3)


def test_weights_that_become_one_constant(tmp_path: Path) -> None:
    """Seen: TensorRT-RTX multiplies queries, keys and values at once."""
    result = build(projections(tmp_path, 256, 128), tmp_path, precision="fp16", placement={"*": "float"})
    engines = [row["engine"] for row in result["layers"]]
    assert {engine["layer"] for engine in engines} == {engines[0]["layer"]}
    assert [engine["bytes"] for engine in engines] == [2 * 256 * 64] * 3
    assert raw_constants(tmp_path / "build.log")["Half", 3 * 256 * 64] == 1
    assert engines[0]["note"] == "one constant together with k.weight, v.weight"
