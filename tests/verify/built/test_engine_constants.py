"""Whether an engine's bytes hold the placed weights: real engines, and layouts that were seen in others, by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_nets import coded, save, tensor

from slope_compile.build import process
from slope_compile.build.engine import build_engine
from slope_compile.events import Events
from slope_compile.recipe import BuildSection
from slope_compile.verify.built import constants
from slope_compile.verify.built.check import check_engine_layers
from slope_compile.verify.built.constants import MOST_ABSENT, MOST_PLACES, Constants, find_constants
from slope_compile.verify.parity.engine import EngineUnderTest

RTX = {"backend": "tensorrt-rtx", "version": "1.7.1.116"}
SHAPES = {
    "c": (16, 3, 3, 3),
    "d": (10, 16, 3, 3),
    "f": (10, 64),
    "g": (64, 33),
}  # c gets padded


def exported(path: Path, seed: int) -> Path:
    """Two convolutions that multiply INT8, then two matrices whose activations are in float."""
    random, tensors, nodes = np.random.default_rng(seed), [tensor("s", np.float32(0.1), "FLOAT")], []
    tensors.append(tensor("z", np.int8(0), "INT8"))
    for name, shape in SHAPES.items():
        axis, dtype = (0, "INT8") if name in "cd" else (1, "INT4")
        scale = random.uniform(0.01, 0.02, shape[axis])
        made, node = coded(f"{name}.weight", random.integers(-7, 8, shape), scale, dtype, axis=axis)
        tensors += made
        nodes.append(node)
    for value in "xc":
        for op, of, to in (("QuantizeLinear", value, f"{value}.q"), ("DequantizeLinear", f"{value}.q", f"{value}.dq")):
            nodes.append(helper.make_node(op, [of, "s", "z"], [to], name=to))
        name = "c" if value == "x" else "d"
        nodes.append(helper.make_node("Conv", [f"{value}.dq", f"{name}.weight"], [name], name=name, pads=[1] * 4))
    nodes.append(helper.make_node("GlobalAveragePool", ["d"], ["p"], name="p"))
    nodes.append(helper.make_node("Flatten", ["p"], ["v"], name="v"))
    nodes.append(helper.make_node("MatMul", ["v", "f.weight"], ["f"], name="f"))
    nodes.append(helper.make_node("MatMul", ["f", "g.weight"], ["y"], name="g"))
    return save(path, nodes, tensors, ["batch", 3, 8, 8], "y")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two engines of one graph, with other numbers."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("engine")
        exported(folder / "model.onnx", seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process, "MOST_BUILDS", 1)  # bytes that repeat are another test's business
            section = BuildSection(backend="tensorrt-rtx", precision="fp16")
            build_engine(folder / "model.onnx", "a100", section, folder, Events())
        folders.append(folder)
    return folders[0], folders[1]


def check(folder: Path) -> Any:
    engine = EngineUnderTest(folder / "model.engine", folder / "layers.json", trusted=False, sha256=None)
    return check_engine_layers(engine, folder / "model.onnx", folder / "placed.onnx", "a100")


def test_every_weight_is_found(engines: tuple[Path, Path]) -> None:
    for folder in engines:
        found = check(folder)
        assert found.status == "pass", found.detail
        assert found.figures["constants"] == {"looked_for": len(SHAPES), "found": len(SHAPES)}


def test_another_engine_whose_layer_list_was_forged(engines: tuple[Path, Path], tmp_path: Path) -> None:
    folder, other = Path(shutil.copytree(engines[0], tmp_path / "build")), engines[1]
    shutil.copy(other / "model.engine", folder)
    layers, theirs = (json.loads((one / "layers.json").read_text()) for one in (folder, other))
    layers["header"].update({key: theirs["header"][key] for key in ("engine_sha256", "engine_bytes")})
    (folder / "layers.json").write_text(json.dumps(layers))
    found = check(folder)
    assert found.status == "fail"
    assert "c.weight: its codes" in found.detail and "are not in model.engine" in found.detail
    assert found.figures["constants"] == {"looked_for": MOST_ABSENT, "found": 0}
    layers["header"]["version"] = "2.0.0.1"  # the engine's own bytes still say 1.7
    (folder / "layers.json").write_text(json.dumps(layers))
    assert check(folder).status == "fail"


def row(placement: str = "int8-weight", size: int = 0, note: str | None = None, dtype: str | None = "Int8") -> Any:
    return {"placement": placement, "engine": {"held": dtype is not None, "dtype": dtype, "bytes": size, "note": note}}


def look(folder: Path, codes: Any, data: bytes, rows: Any = None, **header: str) -> Constants:
    """Look for an INT8 weight `f.weight` in an engine of these bytes."""
    made, node = coded("f.weight", codes, np.ones(codes.shape[1]), "INT8", axis=1)
    nodes = [node, helper.make_node("MatMul", ["x", "f.weight"], ["y"], name="y")]
    save(folder / "placed.onnx", nodes, made, ["batch", codes.shape[0]], "y")
    (folder / "model.engine").write_bytes(data)
    rows = rows or {"f.weight": row("int8", codes.size)}
    return find_constants(folder / "model.engine", folder / "placed.onnx", rows, RTX | header)


CODES = np.random.default_rng(3).integers(-7, 8, (20, 12)).astype(np.int8)
SHARED = "one constant together with g.weight.codes"


@pytest.mark.parametrize(
    ("layout", "size", "note"),
    [
        (lambda codes: codes, 240, None),
        (lambda codes: codes.T, 240, None),
        (lambda codes: np.pad(codes, ((0, 0), (0, 4))), 320, "padded from 240 elements to 320"),
        (lambda codes: np.pad(codes.T, ((0, 4), (0, 12))), 512, "padded from 240 elements to 512"),
    ],
)
def test_layouts(tmp_path: Path, layout: Callable[[Any], Any], size: int, note: str | None) -> None:
    rows = {"f.weight": row("int8", size, note)}
    noise = np.random.default_rng(4).bytes(5000)
    made = noise + np.ascontiguousarray(layout(CODES)).tobytes() + noise
    assert look(tmp_path, CODES, made, rows) == Constants(1, 1)
    changed = CODES.copy()
    changed[10, 5] ^= 1
    absent = look(tmp_path, changed, made, rows)
    assert absent.absent == ["f.weight: its codes are not in model.engine"]


def test_rows_of_one_constant_that_several_weights_share(tmp_path: Path) -> None:
    codes = np.random.default_rng(5).integers(-7, 8, (40, 36)).astype(np.int8)
    made = bytes(99) + np.hstack([codes[::-1], codes, codes[::-1]]).tobytes() + bytes(99)
    rows = {"f.weight": row("int8", codes.size, SHARED)}
    assert look(tmp_path, codes, made, rows) == Constants(1, 1)
    codes[10, 5] ^= 1  # 4-bit rows of odd lengths are not looked for: it is never held against an engine
    assert look(tmp_path, codes, made, rows) == Constants()
    found = look(tmp_path, CODES, np.hstack([CODES, CODES]).tobytes(), {"f.weight": row("int8", 240, SHARED)})
    assert (found.looked_for, found.absent) == (0, [])
    assert found.unseen.endswith("f.weight: its rows in a constant with others are under 32 bytes")


@pytest.mark.parametrize("tail", [b"", b"\x03"], ids=["near-copies alone", "the weight behind them"])
def test_an_engine_of_near_copies_costs_a_bounded_number_of_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    """All of a weight is compared at each byte of a run that is the weight up to its last code."""
    codes = np.ones((40, 36), np.int8)
    codes[-1, -1] = 3
    compared = []
    counted = constants._Engine._count

    def count(engine: Any) -> None:
        counted(engine)
        compared.append(1)

    monkeypatch.setattr(constants._Engine, "_count", count)
    found = look(tmp_path, codes, bytes([1]) * 20_000 + tail)
    assert len(compared) == MOST_PLACES
    assert (found.looked_for, found.found, found.absent) == (0, 0, [])
    assert found.unseen.endswith(f"f.weight: parts of it are at more than {MOST_PLACES} places of model.engine")


def test_a_larger_constant_may_be_several_weights(tmp_path: Path) -> None:
    """Seen: three matrices, each axis padded, of which the layer list names the first alone."""
    rows = {"f.weight": row("int8", 24 * 36, "padded from 240 elements to 864"), "g": row("int8", 0, None, None)}
    found = look(tmp_path, CODES, bytes(1000), rows)
    assert (found.looked_for, found.absent) == (0, []) and "f.weight: its rows" in found.unseen
    told = look(tmp_path, CODES, bytes(1000), {"f.weight": rows["f.weight"]})
    assert told.absent


def test_scales_are_looked_for_where_they_stay_apart(tmp_path: Path) -> None:
    codes = np.tile(CODES, (1, 2))
    found = look(tmp_path, codes, codes.tobytes() + np.ones(24, np.float32).tobytes(), {"f.weight": row(size=480)})
    assert found == Constants(1, 1)
    lost = look(tmp_path, codes, codes.tobytes() + np.full(24, 2, np.float32).tobytes(), {"f.weight": row(size=480)})
    assert lost.absent == ["f.weight: its scales are not in model.engine"]


def test_what_is_not_looked_for(tmp_path: Path) -> None:
    few = np.zeros_like(CODES)
    few[0] = 1
    assert look(tmp_path, few, b"engine") == Constants()
    assert look(tmp_path, CODES, b"engine", {"f.weight": row(dtype=None)}) == Constants()
    assert "TensorRT lays them out" in look(tmp_path, CODES, b"engine", backend="tensorrt").unseen
    assert "not tried with version 2.0.0.1" in look(tmp_path, CODES, b"engine", version="2.0.0.1").unseen
    assert look(tmp_path, CODES, b"").absent == ["model.engine is empty"]


def test_the_engine_s_own_version_counts_too(tmp_path: Path) -> None:
    begin = b"vtrt" + bytes(20) + bytes([1, 7, 1, 116])
    assert look(tmp_path, CODES, begin + CODES.tobytes(), version="2.0.0.1") == Constants(1, 1)
    assert look(tmp_path, CODES, begin + bytes(500), version="2.0.0.1").absent
